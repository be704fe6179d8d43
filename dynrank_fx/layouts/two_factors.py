"""What a layout of two factors is: a matrix view of a weight, and the ops that apply the factors in turn."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..ops import Shape
from .base import Factors, Layout, shapes_of
from .moments import moments_to_dense, second_moments_to_dense
from .svd import next_basis, right_basis, truncate


@dataclass(frozen=True)
class TwoFactors(Layout):
    """What the two-factor layouts share: everything but their matrix view. ``to_matrix`` serves moments of the weight
    too, ``to_matrices`` those of the factors.
    """

    @abc.abstractmethod
    def weight_shape(self, left: Shape, right: Shape) -> Shape:
        """The shape that factors of these shapes join to."""

    @abc.abstractmethod
    def to_matrices(self, factors: Factors) -> Factors:
        """The factors as B [g, rows, r] and A [g, r, columns]."""

    @abc.abstractmethod
    def from_matrices(self, matrices: Factors, weight: Shape) -> Factors:
        """The inverse of ``to_matrices``."""

    def split(self, weight: Tensor, rank: int) -> Factors:
        """The best factors of this rank per group (see ``truncate`` for the bound on the error)."""
        return self.from_matrices(truncate(self.to_matrix(weight), rank), tuple(weight.shape))

    def followed(self, weight: Tensor, rank: int, last: Factors = ()) -> tuple[Tensor, Factors]:
        """X V Vᵀ and (V,): X is the matrix view with n ≤ m, or its transpose, V [g, n, r] its top right singular
        vectors.
        """
        W = self.to_matrix(weight)
        wide = W.shape[-2] < W.shape[-1]
        X = W.mT if wide else W
        if shapes_of(last) == ((X.shape[0], X.shape[-1], rank),):
            V = next_basis(X, last[0])
        else:
            V = right_basis(X, rank).to(X.dtype).contiguous()
        kept = (X @ V) @ V.mT
        return self.from_matrix(kept.mT if wide else kept, tuple(weight.shape)), (V,)

    def join(self, factors: Factors) -> Tensor:
        B, A = self.to_matrices(factors)
        left, right = factors
        return self.from_matrix(B @ A, self.weight_shape(tuple(left.shape), tuple(right.shape)))

    # As in ``multilinear``, in closed form.

    def first_moment(self, factors: Factors, moments: Factors) -> Tensor:
        return self._joined(moments_to_dense, factors, moments)

    def second_moment(self, factors: Factors, moments: Factors) -> Tensor:
        return self._joined(second_moments_to_dense, factors, moments)

    def _joined(self, to_dense: Callable[..., Tensor], factors: Factors, moments: Factors) -> Tensor:
        left, right = factors
        matrix = to_dense(*self.to_matrices(moments), *self.to_matrices(factors))
        return self.from_matrix(matrix, self.weight_shape(tuple(left.shape), tuple(right.shape)))
