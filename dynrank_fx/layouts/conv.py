"""Layouts of convolutions by two smaller ones: in channels, or along one axis of the kernel and then the others.

Both serve convolutions in groups or not, transposed or not. The shapes are those of the table in ``choose``. Sources:
the channel layout is that of arXiv 2508.08625, the spatial one that of arXiv 1405.3866.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..checks import is_whole
from ..errors import PlanError
from ..ops import ConvolutionOp, ConvOp, Op, Shape
from .base import Factors
from .two_factors import TwoFactors


@dataclass(frozen=True)
class GroupedFactors(TwoFactors):
    """What the layouts of convolutions share. With groups, both stages are grouped, with r channels per group.

    A transposed convolution has its inputs where a convolution has its outputs: the same factors, applied in the other
    order.

    Attributes:
        groups: Groups of the convolution.
    """

    groups: int = 1

    def __post_init__(self) -> None:
        if not is_whole(self.groups, 1):
            raise PlanError(f"a convolution of {self.groups!r} groups cannot be: give a whole number of 1 or more")

    @classmethod
    def for_op(cls, op: Op) -> GroupedFactors:
        assert isinstance(op, ConvolutionOp)
        return cls(op.groups)

    def serves(self, op: Op) -> bool:
        return isinstance(op, ConvolutionOp) and op.groups == self.groups


@dataclass(frozen=True)
class ChannelLayout(GroupedFactors):
    """A k×k convolution to r channels, then 1×1 to all (as in arXiv 2508.08625).

    Of a transposed convolution 1×1 to r channels, then k×k.

    Attributes:
        groups: Groups of the convolution, each with r channels in between.
    """

    name: ClassVar[str] = "channel"

    def last_holds_outputs(self, op: Op) -> bool:
        return isinstance(op, ConvOp)  # the last stage of a transposed convolution is k×k

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

    def stages(self, op: Op, rank: int) -> tuple[tuple[Op, int], ...]:
        assert isinstance(op, ConvolutionOp)
        return _in_order(op, (op, 1), (op.pointwise, 0))


@dataclass(frozen=True)
class SpatialLayout(GroupedFactors):
    """A k1×1 convolution to r channels, then 1×k2 (arXiv 1405.3866).

    The first spatial axis is in the first stage, the others are in the second.

    Attributes:
        groups: Groups of the convolution, each with r channels in between.
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

    def stages(self, op: Op, rank: int) -> tuple[tuple[Op, int], ...]:
        assert isinstance(op, ConvolutionOp)
        return _in_order(op, (op.on_axes([0]), 1), (op.on_axes(range(1, len(op.stride))), 0))


def _in_order(op: ConvolutionOp, right: tuple[Op, int], left: tuple[Op, int]) -> tuple[tuple[Op, int], ...]:
    return (left, right) if op.spreads else (right, left)
