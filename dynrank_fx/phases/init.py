"""What factors start from that no weight gives them: the branch of an ADAPTOR, and random weights."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn

from ..errors import TransitionError
from ..layouts import Factors
from ..phase import Phase
from ..processes import is_part, own, part_as, processes_training, whole
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
    processes = processes_training(net)
    # All norms before anything is drawn: a shared factor is of several weights.
    norms = [site.joined([whole(factor) for factor in site.factors]).square().sum() for site in sites]
    for site, norm in zip(sites, norms, strict=True):
        drawn = processes.from_one(0, partial(_drawn, site, norm), TransitionError, "drawing random factors")
        for factor, value in zip(site.factors, drawn, strict=False):
            own(factor).copy_(own(part_as(value, factor)) if is_part(factor) else value)


def _drawn(site: Switched, norm: Tensor) -> list[Tensor]:
    """For a site its own factors. norm: the square of its weight's."""
    terms, count = site.layout.terms(site.shape, site.rank), len(site.factors)
    deviation = float(norm / (math.prod(site.shape) * terms)) ** (0.5 / count)
    factors = site.factors if not site.owner else site.factors[:1]
    empty = [own(each).new_empty(each.shape) if is_part(each) else torch.empty_like(each) for each in factors]
    return [each.normal_(0.0, deviation) for each in empty]
