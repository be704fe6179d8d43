"""Layouts of weights that products multiply by: a matrix, a stack of them, or any tensor of an einsum.

The shapes are those of the table in ``choose``.
"""

from __future__ import annotations

import math
import string
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from ..ops import EinsumOp, Op, ProductOp, Shape
from .base import Factors
from .two_factors import TwoFactors


@dataclass(frozen=True)
class LinearLayout(TwoFactors):
    """W [m, n] ≈ left [m, r] @ right [r, n], for whatever multiplies by W, by its transpose or by a part of it.

    A weight with more axes before these two is a stack of matrices, each with its own factors.
    """

    name: ClassVar[str] = "linear"

    @classmethod
    def for_op(cls, op: Op) -> LinearLayout:
        return cls()

    def serves(self, op: Op) -> bool:
        return isinstance(op, ProductOp)

    def last_holds_outputs(self, op: Op) -> bool:
        return True

    def matrix_shape(self, weight: Shape) -> tuple[int, int]:
        return weight[-2], weight[-1]

    def factor_shapes(self, weight: Shape, rank: int) -> tuple[Shape, Shape]:
        return (*weight[:-1], rank), (*weight[:-2], rank, weight[-1])

    def weight_shape(self, left: Shape, right: Shape) -> Shape:
        return (*left[:-1], right[-1])

    def to_matrix(self, weight: Tensor) -> Tensor:
        return weight.reshape(-1, *weight.shape[-2:])

    def from_matrix(self, matrix: Tensor, weight: Shape) -> Tensor:
        return matrix.reshape(weight)

    def to_matrices(self, factors: Factors) -> Factors:
        left, right = factors
        return self.to_matrix(left), self.to_matrix(right)

    def from_matrices(self, matrices: Factors, weight: Shape) -> Factors:
        left, right = self.factor_shapes(weight, matrices[0].shape[-1])
        return matrices[0].reshape(left), matrices[1].reshape(right)

    def stages(self, op: Op, rank: int) -> tuple[tuple[Op, int], ...]:
        assert isinstance(op, ProductOp)
        order = ((op.view.of_left(), 0), (op.view.of_right(), 1))
        # The factor that holds the contracted axis comes first: with W = LR, x W = (x L) R and x Wᵀ = (x Rᵀ) Lᵀ.
        (first, i), (last, j) = order if op.contracts_rows != op.view.transposed else order[::-1]
        return (replace(op.first, view=first), i), (replace(op.last, view=last), j)


@dataclass(frozen=True)
class EinsumLayout(TwoFactors):
    """A weight of an einsum as a matrix per shared index: contracted axes by free axes.

    shared, rows, columns: the weight's axes. left [*shared, *rows, r], right [*shared, r, *columns].
    """

    shared: tuple[int, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]

    name: ClassVar[str] = "einsum"

    @classmethod
    def for_op(cls, op: Op) -> EinsumLayout:
        assert isinstance(op, EinsumOp)
        return cls(*op.axes)

    def serves(self, op: Op) -> bool:
        if not isinstance(op, EinsumOp):
            return False
        shared, contracted, free = op.axes
        return shared == self.shared and {contracted, free} == {self.rows, self.columns}

    def last_holds_outputs(self, op: Op) -> bool:
        return True

    def _sizes(self, weight: Shape) -> tuple[Shape, Shape, Shape]:
        shared, rows, columns = (tuple(weight[i] for i in axes) for axes in (self.shared, self.rows, self.columns))
        return shared, rows, columns

    def matrix_shape(self, weight: Shape) -> tuple[int, int]:
        _, rows, columns = self._sizes(weight)
        return math.prod(rows), math.prod(columns)

    def factor_shapes(self, weight: Shape, rank: int) -> tuple[Shape, Shape]:
        shared, rows, columns = self._sizes(weight)
        return (*shared, *rows, rank), (*shared, rank, *columns)

    def weight_shape(self, left: Shape, right: Shape) -> Shape:
        s = len(self.shared)
        sizes = (*left[:-1], *right[s + 1 :])
        return tuple(sizes[self._order.index(axis)] for axis in range(len(self._order)))

    @property
    def _order(self) -> tuple[int, ...]:
        return (*self.shared, *self.rows, *self.columns)

    def to_matrix(self, weight: Tensor) -> Tensor:
        shared, rows, columns = self._sizes(tuple(weight.shape))
        return weight.permute(self._order).reshape(math.prod(shared), math.prod(rows), math.prod(columns))

    def from_matrix(self, matrix: Tensor, weight: Shape) -> Tensor:
        back = [self._order.index(axis) for axis in range(len(self._order))]
        return matrix.reshape([weight[axis] for axis in self._order]).permute(back)

    def to_matrices(self, factors: Factors) -> Factors:
        left, right = factors
        s, rank = math.prod(left.shape[: len(self.shared)]), left.shape[-1]
        return left.reshape(s, -1, rank), right.reshape(s, rank, -1)

    def from_matrices(self, matrices: Factors, weight: Shape) -> Factors:
        left, right = self.factor_shapes(weight, matrices[0].shape[-1])
        return matrices[0].reshape(left), matrices[1].reshape(right)

    def stages(self, op: Op, rank: int) -> tuple[tuple[Op, int], ...]:
        assert isinstance(op, EinsumOp)
        r = next(letter for letter in string.ascii_letters if letter not in op.x + op.weight + op.out)
        shared, rows, columns = ("".join(op.weight[i] for i in axes) for axes in (self.shared, self.rows, self.columns))
        left, right = (f"{shared}{rows}{r}", 0), (f"{shared}{r}{columns}", 1)
        contracted = "".join(op.weight[i] for i in op.axes[1])
        (first, i), (last, j) = (left, right) if contracted == rows else (right, left)
        between = "".join(c for c in op.x if c not in contracted) + r
        return (EinsumOp(op.x, first, between), i), (EinsumOp(between, last, op.out), j)
