"""What the parameters of a site hold after a switch: values with the optimizer states that go with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..layouts import Factors, Layout
from ..rewrite import Switched
from .carry import moved_to_dense, moved_to_factors, unstacked_state, written_states
from .groups import State
from .replace import parameters_of

Value: TypeAlias = tuple[Tensor, State]


Split: TypeAlias = Callable[[Sequence[str], Layout, Tensor, int], Factors | None]
"""Factors of a rank for the weight of a site (or the weights of several that share a factor, one above the other) by
something else than the weight alone; None where nothing else is known.
"""


def factors_of(
    firsts: Sequence[Switched],
    weights: list[Tensor],
    rank: int,
    optimizer: Optimizer | None,
    split: Split | None = None,
) -> list[list[Value]]:
    """Per site the values of its new parameters with their optimizer states: all factors, and (left,) of those that
    share the first one's right. split: by default the layout's own.
    """
    layout, sizes = firsts[0].layout, [weight.shape[0] for weight in weights]
    stacked = torch.cat(weights) if len(weights) > 1 else weights[0]
    given = split([module.site for module in firsts], layout, stacked, rank) if split is not None else None
    factors = layout.split(stacked, rank) if given is None else given
    states: list[State] = [{} for _ in factors]
    if optimizer is not None:
        states = moved_to_factors(optimizer, [parameters_of(m)[0] for m in firsts], factors, layout)
    left, *others = factors
    lefts = left.split(sizes) if len(sizes) > 1 else [left]
    of_lefts, of_others = unstacked_state(states[0], sizes), states[1:]
    if optimizer is not None:
        of_lefts, of_others = written_states(optimizer, of_lefts), written_states(optimizer, of_others)
    new = [[value] for value in zip(lefts, of_lefts, strict=True)]
    new[0] += zip(others, of_others, strict=True)
    return new


def dense_of(firsts: Sequence[Switched], weights: list[Tensor], optimizer: Optimizer | None) -> list[list[Value]]:
    """Per site the value of its dense weight with its optimizer state."""
    sizes, states = [weight.shape[0] for weight in weights], [State() for _ in weights]
    if optimizer is not None:
        lefts, others = [module.factors[0] for module in firsts], firsts[0].factors[1:]
        stacked = torch.cat(weights) if len(weights) > 1 else weights[0]
        (state,) = moved_to_dense(optimizer, lefts, others, stacked, firsts[0].layout)
        states = written_states(optimizer, unstacked_state(state, sizes))
    return [[value] for value in zip(weights, states, strict=True)]
