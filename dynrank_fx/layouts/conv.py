"""Layouts of convolutions by two smaller ones: in output or input channels, or along one axis of the kernel.

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
from ..ops import ConvolutionOp, ConvOp, ConvTransposeOp, Op, Shape
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

    def first_holds_inputs(self, op: Op) -> bool:
        return isinstance(op, ConvTransposeOp)  # the first stage of a convolution is k×k

    def last_holds_outputs(self, op: Op) -> bool:
        return isinstance(op, ConvOp)  # and the last one of a transposed convolution

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
class _KernelSplit(GroupedFactors):
    """The first ``ahead`` axes of the kernel are in the right factor, with the inputs, the others in the left one."""

    ahead: ClassVar[int]

    def matrix_shape(self, weight: Shape) -> tuple[int, int]:
        m, n, *kernel = weight
        return m // self.groups * math.prod(kernel[self.ahead :]), n * math.prod(kernel[: self.ahead])

    def factor_shapes(self, weight: Shape, rank: int) -> tuple[Shape, Shape]:
        m, n, *kernel = weight
        left = (m, rank, *(1 for _ in kernel[: self.ahead]), *kernel[self.ahead :])
        return left, (self.groups * rank, n, *kernel[: self.ahead], *(1 for _ in kernel[self.ahead :]))

    def weight_shape(self, left: Shape, right: Shape) -> Shape:
        return left[0], *right[1 : 2 + self.ahead], *left[2 + self.ahead :]

    def to_matrix(self, weight: Tensor) -> Tensor:
        # [g, m/g, n/g, k1, k2] -> rows (m/g, k2), columns (n/g, k1)
        rows, columns = self.matrix_shape(tuple(weight.shape))
        return self._parts(weight).permute(0, 1, 4, 2, 3).reshape(self.groups, rows, columns)

    def from_matrix(self, matrix: Tensor, weight: Shape) -> Tensor:
        m, n, *kernel = weight
        k1, k2 = math.prod(kernel[: self.ahead]), math.prod(kernel[self.ahead :])
        view = matrix.reshape(self.groups, m // self.groups, k2, n, k1)
        return view.permute(0, 1, 3, 4, 2).reshape(weight)

    def to_matrices(self, factors: Factors) -> Factors:
        left, right = factors
        rank = left.shape[1]
        view = self._parts(left)[:, :, :, 0].transpose(2, 3)
        return view.reshape(self.groups, -1, rank), right.reshape(self.groups, rank, -1)

    def from_matrices(self, matrices: Factors, weight: Shape) -> Factors:
        rank, m = matrices[0].shape[-1], weight[0]
        left, right = self.factor_shapes(weight, rank)
        view = matrices[0].reshape(self.groups, m // self.groups, -1, rank).transpose(2, 3)
        return view.reshape(left), matrices[1].reshape(right)

    def _parts(self, weight: Tensor) -> Tensor:
        """[g, m/g, n/g, k1, k2]."""
        m, n, *kernel = weight.shape
        k1, k2 = math.prod(kernel[: self.ahead]), math.prod(kernel[self.ahead :])
        return weight.reshape(self.groups, m // self.groups, n, k1, k2)


@dataclass(frozen=True)
class SpatialLayout(_KernelSplit):
    """A k1×1 convolution to r channels, then 1×k2 (arXiv 1405.3866).

    The first spatial axis is in the first stage, the others are in the second.

    Attributes:
        groups: Groups of the convolution, each with r channels in between.
    """

    name: ClassVar[str] = "spatial"
    ahead: ClassVar[int] = 1

    def stages(self, op: Op, rank: int) -> tuple[tuple[Op, int], ...]:
        assert isinstance(op, ConvolutionOp)
        return _in_order(op, (op.on_axes([0]), 1), (op.on_axes(range(1, len(op.stride))), 0))


@dataclass(frozen=True)
class InputLayout(_KernelSplit):
    """A 1×1 convolution to r channels, then k×k to all: the channel layout with its stages changed about.

    Of a transposed convolution k×k to r channels, then 1×1. It serves layers with many more inputs than outputs, and
    those whose inputs hold less than their outputs do.

    Attributes:
        groups: Groups of the convolution, each with r channels in between.
    """

    name: ClassVar[str] = "input"
    ahead: ClassVar[int] = 0

    def first_holds_inputs(self, op: Op) -> bool:
        return isinstance(op, ConvOp)

    def last_holds_outputs(self, op: Op) -> bool:
        return isinstance(op, ConvTransposeOp)

    def stages(self, op: Op, rank: int) -> tuple[tuple[Op, int], ...]:
        assert isinstance(op, ConvolutionOp)
        return _in_order(op, (op.pointwise, 1), (op, 0))


def _in_order(op: ConvolutionOp, right: tuple[Op, int], left: tuple[Op, int]) -> tuple[tuple[Op, int], ...]:
    return (left, right) if op.spreads else (right, left)
