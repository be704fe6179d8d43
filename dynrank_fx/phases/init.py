"""What factors start from that no weight gives them: the branch of an ADAPTOR, and random weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import TransitionError
from ..layouts import Factors
from ..phase import Phase
from ..processes import processes_of, wrappers_of
from ..rewrite import Switched, switched_modules
from ..tracing import unwrap


def branch(module: Switched, rank: int, like: Tensor) -> Factors:
    """Factors whose product is zero: that applied last is, the others are random as torch initialises a layer."""
    shapes, last = module.layout.factor_shapes(module.shape, rank), module.layout.stages(module.ops[0], rank)[-1][1]
    factors = tuple(like.new_zeros(shape) for shape in shapes)
    for index, factor in enumerate(factors):
        if index != last:
            torch.nn.init.kaiming_uniform_(factor, a=5**0.5)
    return factors


@torch.no_grad()
def randomize_(net: nn.Module) -> None:
    """Give the factors of every site in LOW random values in place of those they have: low rank from random init.

    Entries are normal, of one variance in all factors, with which the product's norm is expected to be what it was: for
    two, (‖W‖_F² / (m n r))^¼ as standard deviation.

    Args:
        net: What ``transform`` made, with at least one site in LOW.

    Raises:
        TransitionError: Where no site is in LOW.
    """
    sites = [modules[0] for modules in switched_modules(unwrap(net)).values() if modules[0].phase == int(Phase.LOW)]
    if not sites:
        raise TransitionError(
            "no site is in LOW, so that there are no factors to randomize: enter_(net, Phase.LOW) first"
        )
    processes = processes_of(wrappers_of(net))
    drawn = processes.from_one(0, lambda: _drawn(sites), TransitionError, "drawing random factors")
    for site, values in zip(sites, drawn, strict=True):
        for factor, value in zip(site.factors, values, strict=False):
            factor.copy_(value)


def _drawn(sites: Sequence[Switched]) -> list[list[Tensor]]:
    """For each site its own factors."""
    drawn = []
    norms = [site.weight.square().sum() for site in sites]
    for site, norm in zip(sites, norms, strict=True):
        terms, count = site.layout.terms(site.shape, site.rank), len(site.factors)
        deviation = float(norm / (math.prod(site.shape) * terms)) ** (0.5 / count)
        own = site.factors if not site.owner else site.factors[:1]
        drawn.append([torch.empty_like(factor).normal_(0.0, deviation) for factor in own])
    return drawn
