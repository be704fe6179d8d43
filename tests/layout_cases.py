"""Layouts, each with the cases of ops that it serves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from op_cases import CONVS, EMBEDDINGS, PRODUCTS, TRANSPOSED, OpCase
from torch import Tensor

from dynrank_fx.layouts import (
    ChannelLayout,
    CPLayout,
    Factors,
    InputLayout,
    Layout,
    SpatialLayout,
    TuckerLayout,
    layout_for,
)

_RARE = ("3d", "unbatched", "gathered", "one of a stack", "broadcast", "circular")  # for make fuzz


def _param(layout: Layout, name: str, case: OpCase) -> Any:
    marks = [pytest.mark.fuzz] if any(word in name for word in _RARE) else []
    return pytest.param(layout, case, id=f"{name}-{layout.name}", marks=marks)


TWO_FACTORS = [_param(layout_for(case.op), name, case) for name, case in (PRODUCTS | EMBEDDINGS).items()] + [
    _param(layout.for_op(case.op), name, case)
    for name, case in (CONVS | TRANSPOSED).items()
    for layout in (ChannelLayout, InputLayout, SpatialLayout)
]
TENSORS = [
    _param(layout, name, case)
    for name, case in CONVS.items()
    for layout in (TuckerLayout(), CPLayout())
    if layout.serves(case.op)
]
by_two_factors = pytest.mark.parametrize(("layout", "case"), TWO_FACTORS)


def layouts(rule: Callable[[Layout, OpCase], bool]) -> pytest.MarkDecorator:
    """The decorator of a test of a layout and a case, of those that the rule takes."""
    chosen = [each for each in TWO_FACTORS + TENSORS if rule(*each.values)]
    return pytest.mark.parametrize(("layout", "case"), chosen)


by_layout = layouts(lambda layout, case: True)


def apply(layout: Layout, case: OpCase, rank: int, x: Tensor, factors: Factors, bias: Tensor | None = None) -> Tensor:
    """The stages one after the other; the bias goes to the last."""
    *first, (last, index) = layout.stages(case.op, rank)
    for stage, i in first:
        x = stage(x, factors[i], at=case.index)
    return last(x, factors[index], bias, case.index)
