"""Layouts: how a weight becomes factors and one op becomes several.

A layout is a frozen value with two pure functions, ``split(weight, rank) -> factors`` and ``join(factors) ->
weight``, and with ``stages(op)``, the ops that apply the factors one after the other. Two-factor layouts are a matrix
view of the weight per group.

Shapes: g groups, m output and n input channels of the whole weight, k kernel sizes, r rank.

==========  =====================  ========================  ==========================
layout      weight                 left                      right (applied first)
==========  =====================  ========================  ==========================
linear      [m, n]                 [m, r]                    [r, n]
channel     [m, n/g, *k]           [m, r, 1, ...]            [g·r, n/g, *k]
spatial     [m, n/g, k1, *k2]      [m, r, 1, *k2]            [g·r, n/g, k1, 1, ...]
==========  =====================  ========================  ==========================
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

from torch import Tensor

from . import lowrank
from .errors import PlanError
from .ops import ConvOp, LinearOp, Op, Shape

Factors: TypeAlias = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class TwoFactors:
    """What the two-factor layouts share: everything but their matrix view."""

    groups: int = 1

    name: ClassVar[str]
    exact: ClassVar[bool] = True
    factor_names: ClassVar[tuple[str, str]] = ("left", "right")

    def matrix_shape(self, weight: Shape) -> tuple[int, int]:
        """Rows and columns of the matrix of one group."""
        raise NotImplementedError

    def factor_shapes(self, weight: Shape, rank: int) -> tuple[Shape, Shape]:
        """Shapes of left and right."""
        raise NotImplementedError

    def weight_shape(self, left: Shape, right: Shape) -> Shape:
        """The shape that factors of these shapes join to."""
        raise NotImplementedError

    def to_matrix(self, weight: Tensor) -> Tensor:
        """The weight as [g, rows, columns]; a moment of the weight likewise."""
        raise NotImplementedError

    def from_matrix(self, matrix: Tensor, weight: Shape) -> Tensor:
        """The inverse of ``to_matrix``."""
        raise NotImplementedError

    def to_matrices(self, factors: Factors) -> Factors:
        """The factors as B [g, rows, r] and A [g, r, columns]; their moments likewise."""
        raise NotImplementedError

    def from_matrices(self, matrices: Factors, weight: Shape) -> Factors:
        """The inverse of ``to_matrices``."""
        raise NotImplementedError

    def stages(self, op: Op) -> tuple[tuple[Op, int], ...]:
        """(op, index of its factor) in the order they apply; the bias goes to the last."""
        raise NotImplementedError

    def max_rank(self, weight: Shape) -> int:
        """The rank at which the factors reproduce any weight of this shape."""
        return min(self.matrix_shape(weight))

    def split(self, weight: Tensor, rank: int) -> Factors:
        """The best factors of this rank per group (see ``lowrank.truncate`` for the bound on the error)."""
        return self.from_matrices(lowrank.truncate(self.to_matrix(weight), rank), tuple(weight.shape))

    def join(self, factors: Factors) -> Tensor:
        """The weight that the factors stand for."""
        B, A = self.to_matrices(factors)
        left, right = factors
        return self.from_matrix(B @ A, self.weight_shape(tuple(left.shape), tuple(right.shape)))

    def params(self, weight: Shape, rank: int) -> int:
        """How many numbers the factors hold."""
        return sum(math.prod(shape) for shape in self.factor_shapes(weight, rank))

    def flops(self, op: Op, x: Shape, weight: Shape, rank: int) -> int:
        """FLOPs of all stages for one input of shape ``x``."""
        shapes, total = self.factor_shapes(weight, rank), 0
        for stage, index in self.stages(op):
            total += stage.flops(x, shapes[index])
            x = stage.output_shape(x, shapes[index])
        return total


@dataclass(frozen=True)
class LinearLayout(TwoFactors):
    """W [m, n] ≈ left [m, r] @ right [r, n]."""

    name: ClassVar[str] = "linear"

    def matrix_shape(self, weight: Shape) -> tuple[int, int]:
        return weight[0], weight[1]

    def factor_shapes(self, weight: Shape, rank: int) -> tuple[Shape, Shape]:
        return (weight[0], rank), (rank, weight[1])

    def weight_shape(self, left: Shape, right: Shape) -> Shape:
        return left[0], right[1]

    def to_matrix(self, weight: Tensor) -> Tensor:
        return weight[None]

    def from_matrix(self, matrix: Tensor, weight: Shape) -> Tensor:
        return matrix[0]

    def to_matrices(self, factors: Factors) -> Factors:
        return factors[0][None], factors[1][None]

    def from_matrices(self, matrices: Factors, weight: Shape) -> Factors:
        return matrices[0][0], matrices[1][0]

    def stages(self, op: Op) -> tuple[tuple[Op, int], ...]:
        return (LinearOp(), 1), (LinearOp(), 0)


@dataclass(frozen=True)
class ChannelLayout(TwoFactors):
    """A k×k convolution to r channels, then 1×1; with groups, both stages grouped and r per group."""

    name: ClassVar[str] = "channel"

    def matrix_shape(self, weight: Shape) -> tuple[int, int]:
        return weight[0] // self.groups, math.prod(weight[1:])

    def factor_shapes(self, weight: Shape, rank: int) -> tuple[Shape, Shape]:
        return (weight[0], rank, *(1 for _ in weight[2:])), (self.groups * rank, *weight[1:])

    def weight_shape(self, left: Shape, right: Shape) -> Shape:
        return left[0], *right[1:]

    def to_matrix(self, weight: Tensor) -> Tensor:
        return weight.reshape(self.groups, weight.shape[0] // self.groups, -1)

    def from_matrix(self, matrix: Tensor, weight: Shape) -> Tensor:
        return matrix.reshape(weight)

    def to_matrices(self, factors: Factors) -> Factors:
        left, right = factors
        rank = left.shape[1]
        return left.reshape(self.groups, -1, rank), right.reshape(self.groups, rank, -1)

    def from_matrices(self, matrices: Factors, weight: Shape) -> Factors:
        left, right = self.factor_shapes(weight, matrices[0].shape[-1])
        return matrices[0].reshape(left), matrices[1].reshape(right)

    def stages(self, op: Op) -> tuple[tuple[Op, int], ...]:
        assert isinstance(op, ConvOp)
        return (op, 1), (_pointwise(op), 0)


@dataclass(frozen=True)
class SpatialLayout(TwoFactors):
    """A k1×1 convolution to r channels, then 1×k2: the first spatial axis in the first stage, the others in the
    second.
    """

    name: ClassVar[str] = "spatial"

    def matrix_shape(self, weight: Shape) -> tuple[int, int]:
        return weight[0] // self.groups * math.prod(weight[3:]), weight[1] * weight[2]

    def factor_shapes(self, weight: Shape, rank: int) -> tuple[Shape, Shape]:
        m, n, k1, *k2 = weight
        return (m, rank, 1, *k2), (self.groups * rank, n, k1, *(1 for _ in k2))

    def weight_shape(self, left: Shape, right: Shape) -> Shape:
        return left[0], right[1], right[2], *left[3:]

    def to_matrix(self, weight: Tensor) -> Tensor:
        # [g, m/g, n/g, k1, k2] -> rows (m/g, k2), columns (n/g, k1)
        m, n, k1, *k2 = weight.shape
        view = weight.reshape(self.groups, m // self.groups, n, k1, math.prod(k2))
        return view.permute(0, 1, 4, 2, 3).reshape(self.groups, m // self.groups * math.prod(k2), n * k1)

    def from_matrix(self, matrix: Tensor, weight: Shape) -> Tensor:
        m, n, k1, *k2 = weight
        view = matrix.reshape(self.groups, m // self.groups, math.prod(k2), n, k1)
        return view.permute(0, 1, 3, 4, 2).reshape(weight)

    def to_matrices(self, factors: Factors) -> Factors:
        left, right = factors
        m, rank, _, *k2 = left.shape
        view = left.reshape(self.groups, m // self.groups, rank, math.prod(k2)).permute(0, 1, 3, 2)
        return view.reshape(self.groups, -1, rank), right.reshape(self.groups, rank, -1)

    def from_matrices(self, matrices: Factors, weight: Shape) -> Factors:
        rank, (m, _, _, *k2) = matrices[0].shape[-1], weight
        left, right = self.factor_shapes(weight, rank)
        view = matrices[0].reshape(self.groups, m // self.groups, math.prod(k2), rank).permute(0, 1, 3, 2)
        return view.reshape(left), matrices[1].reshape(right)

    def stages(self, op: Op) -> tuple[tuple[Op, int], ...]:
        assert isinstance(op, ConvOp)
        return (op.on_axes([0]), 1), (op.on_axes(range(1, len(op.stride))), 0)


def _pointwise(op: ConvOp) -> ConvOp:
    ones = tuple(1 for _ in op.stride)
    return ConvOp(stride=ones, padding=tuple(0 for _ in op.stride), dilation=ones, groups=op.groups)


Layout: TypeAlias = TwoFactors
ConvLayout: TypeAlias = type[ChannelLayout] | type[SpatialLayout]

LAYOUTS: tuple[type[TwoFactors], ...] = (LinearLayout, ChannelLayout, SpatialLayout)


def layout_named(name: str, groups: int = 1) -> Layout:
    """The layout a plan file names. Raises PlanError for a name that no layout has."""
    for layout in LAYOUTS:
        if layout.name == name:
            return layout(groups)
    known = ", ".join(layout.name for layout in LAYOUTS)
    raise PlanError(f"there is no layout {name!r}; choose one of {known}")
