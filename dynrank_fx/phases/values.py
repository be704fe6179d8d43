"""What the parameters of a site hold after a switch: values with the optimizer states that go with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from ..layouts import Factors, Layout
from ..rewrite import Switched
from .carry import moved_to_dense, moved_to_factors, unstacked_state
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
    new = [[value] for value in zip(lefts, unstacked_state(states[0], sizes), strict=True)]
    new[0] += zip(others, states[1:], strict=True)
    return new


def dense_of(firsts: Sequence[Switched], weights: list[Tensor], optimizer: Optimizer | None) -> list[list[Value]]:
    """Per site the value of its dense weight with its optimizer state."""
    sizes, states = [weight.shape[0] for weight in weights], [State() for _ in weights]
    if optimizer is not None:
        lefts, others = [module.factors[0] for module in firsts], firsts[0].factors[1:]
        stacked = torch.cat(weights) if len(weights) > 1 else weights[0]
        (state,) = moved_to_dense(optimizer, lefts, others, stacked, firsts[0].layout)
        states = unstacked_state(state, sizes)
    return [[value] for value in zip(weights, states, strict=True)]


def in_format_of(value: Tensor, old: Sequence[Parameter]) -> Tensor:
    """In the memory format of the parameters it replaces (channels_last stays so), with the strides of a new tensor.

    ``contiguous`` alone leaves any strides to axes of one entry: by those torch chooses its kernels, and torch.compile
    would take the parameter for one that it has not seen.
    """
    last = value.ndim == 4 and any(_is_channels_last(parameter) for parameter in old)
    layout = torch.channels_last if last else torch.contiguous_format
    if value.stride() == torch.empty(value.shape, device="meta", memory_format=layout).stride():
        return value
    return torch.empty_like(value, memory_format=layout).copy_(value)


def _is_channels_last(parameter: Tensor) -> bool:
    if parameter.ndim != 4 or parameter.stride() == torch.empty(parameter.shape, device="meta").stride():
        return False
    return parameter.is_contiguous(memory_format=torch.channels_last)
