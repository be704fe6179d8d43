"""Layouts: how a weight becomes factors and one op becomes several.

A layout is a frozen value with two pure functions, ``split(weight, rank) -> factors`` and ``join(factors) ->
weight``, and with ``stages(op)``, the ops that apply the factors one after the other. Two-factor layouts are a matrix
view of the weight per group; tucker and cp have more factors.

Shapes: g groups, m output and n input channels of the whole weight, k kernel sizes, r rank.

==========  =====================  ========================  ==========================
layout      weight                 left                      right
==========  =====================  ========================  ==========================
linear      [..., m, n]            [..., m, r]               [..., r, n]
einsum      any order of axes      [shared, rows, r]         [shared, r, columns]
channel     [m, n/g, *k]           [m, r, 1, ...]            [g·r, n/g, *k]
input       [m, n/g, *k]           [m, r, *k]                [g·r, n/g, 1, ...]
spatial     [m, n/g, k1, *k2]      [m, r, 1, *k2]            [g·r, n/g, k1, 1, ...]
tucker      [m, n, *k]             [m, r, 1, ...]            [s, n, 1, ...], core [r, s, *k]
cp          [m, n, k1, k2]         [m, r, 1, 1]              [r, n, 1, 1], along [r, 1, k1, 1], across [r, 1, 1, k2]
==========  =====================  ========================  ==========================

Which factor is applied first is the op's: that with the axis it contracts. A transposed convolution's weight is
[n, m/g, *k], read here as [m, n/g, *k].
"""

from __future__ import annotations

from typing import TypeAlias

from ..errors import PlanError
from ..ops import ConvolutionOp, EinsumOp, Op
from .base import Layout
from .conv import ChannelLayout, InputLayout, SpatialLayout
from .matrix import EinsumLayout, LinearLayout
from .tensor import CPLayout, TuckerLayout

ConvLayout: TypeAlias = type[Layout]
"""One of ``CONV_LAYOUTS``."""

CONV_LAYOUTS: tuple[ConvLayout, ...] = (ChannelLayout, InputLayout, SpatialLayout, TuckerLayout, CPLayout)
LAYOUTS: tuple[type[Layout], ...] = (LinearLayout, EinsumLayout, *CONV_LAYOUTS)


def layout_for(op: Op, conv_layout: ConvLayout = ChannelLayout) -> Layout:
    """The layout of a weight that the op applies: the one there is, or for convolutions the one chosen; what that does
    not serve (Tucker and CP take ordinary convolutions in one group alone), the channel layout does.
    """
    if isinstance(op, EinsumOp):
        return EinsumLayout.for_op(op)
    if not isinstance(op, ConvolutionOp):
        return LinearLayout()
    layout = conv_layout.for_op(op)
    return layout if layout.serves(op) else ChannelLayout.for_op(op)


def layout_named(name: str, op: Op) -> Layout:
    """The layout a plan file names, for a weight that the op applies.

    Raises PlanError for a name that no layout has, or one that does not serve the op.
    """
    for layout in (layout_for(op, conv_layout) for conv_layout in CONV_LAYOUTS):
        if layout.name == name:
            return layout
    known = [layout.name for layout in LAYOUTS]
    if name in known:
        raise PlanError(f"the layout {name!r} does not serve {op.kind}")
    raise PlanError(f"there is no layout {name!r}; choose one of {', '.join(known)}")
