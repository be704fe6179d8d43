"""What a layout of two factors is: a matrix view of a weight, and the ops that apply the factors in turn."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

from torch import Tensor

from . import lowrank
from .ops import Op, Shape

Factors: TypeAlias = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class TwoFactors:
    """What the two-factor layouts share: everything but their matrix view."""

    name: ClassVar[str]
    exact: ClassVar[bool] = True
    factor_names: ClassVar[tuple[str, str]] = ("left", "right")

    @classmethod
    def for_op(cls, op: Op) -> TwoFactors:
        """The layout of this kind for a weight that the op applies."""
        raise NotImplementedError

    def serves(self, op: Op) -> bool:
        """Whether the factors can do what the op does with the weight."""
        raise NotImplementedError

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

    def join_flops(self, weight: Shape, rank: int) -> int:
        """FLOPs of computing the weight from its factors."""
        return 2 * math.prod(weight) * rank

    def flops(self, op: Op, x: Shape, weight: Shape, rank: int, *, last_only: bool = False) -> int:
        """FLOPs of all stages for one input of shape ``x``; of the last alone where another site does the first."""
        shapes, counts = self.factor_shapes(weight, rank), []
        for stage, index in self.stages(op):
            counts.append(stage.flops(x, shapes[index]))
            x = stage.output_shape(x, shapes[index])
        return counts[-1] if last_only else sum(counts)
