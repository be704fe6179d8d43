"""Layouts: how a weight becomes factors and one op becomes several.

A layout is a frozen value with two pure functions, ``split(weight, rank) -> factors`` and ``join(factors) ->
weight``, and with ``stages(op)``, the ops that apply the factors one after the other. Two-factor layouts are a matrix
view of the weight per group.

Shapes: g groups, m output and n input channels of the whole weight, k kernel sizes, r rank.

==========  =====================  ========================  ==========================
layout      weight                 left                      right
==========  =====================  ========================  ==========================
linear      [..., m, n]            [..., m, r]               [..., r, n]
einsum      any order of axes      [shared, rows, r]         [shared, r, columns]
channel     [m, n/g, *k]           [m, r, 1, ...]            [g·r, n/g, *k]
spatial     [m, n/g, k1, *k2]      [m, r, 1, *k2]            [g·r, n/g, k1, 1, ...]
==========  =====================  ========================  ==========================

Which factor is applied first is the op's: that with the axis it contracts. A transposed convolution's weight is
[n, m/g, *k], read here as [m, n/g, *k].
"""

from __future__ import annotations

from typing import TypeAlias

from .convlayout import ChannelLayout, SpatialLayout
from .errors import PlanError
from .matrixlayout import EinsumLayout, LinearLayout
from .ops import EinsumOp, EmbeddingOp, LinearOp, MatmulOp, Op
from .twofactors import Factors, TwoFactors

__all__ = [
    "LAYOUTS",
    "ChannelLayout",
    "ConvLayout",
    "EinsumLayout",
    "Factors",
    "Layout",
    "LinearLayout",
    "SpatialLayout",
    "layout_for",
    "layout_named",
]

Layout: TypeAlias = TwoFactors
ConvLayout: TypeAlias = type[ChannelLayout] | type[SpatialLayout]

LAYOUTS: tuple[type[TwoFactors], ...] = (LinearLayout, EinsumLayout, ChannelLayout, SpatialLayout)


def layout_for(op: Op, conv_layout: ConvLayout = ChannelLayout) -> Layout:
    """The layout of a weight that the op applies: the one there is, or for convolutions the one chosen."""
    if isinstance(op, EinsumOp):
        return EinsumLayout.for_op(op)
    if isinstance(op, LinearOp | MatmulOp | EmbeddingOp):
        return LinearLayout()
    return conv_layout.for_op(op)


def layout_named(name: str, op: Op) -> Layout:
    """The layout a plan file names, for a weight that the op applies.

    Raises PlanError for a name that no layout has, or one that does not serve the op.
    """
    for layout in (layout_for(op), layout_for(op, SpatialLayout)):
        if layout.name == name:
            return layout
    known = [layout.name for layout in LAYOUTS]
    if name in known:
        raise PlanError(f"the layout {name!r} does not serve a {op.kind}")
    raise PlanError(f"there is no layout {name!r}; choose one of {', '.join(known)}")
