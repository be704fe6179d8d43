"""Layouts of two factors: a matrix view W ≈ B A of a weight, cut by its singular vectors (Eckart and Young)."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..ops import Shape
from .base import Factors, Layout, shapes_of
from .moments import moments_to_dense, second_moments_to_dense
from .svd import SMALL, next_basis, right_basis, truncate


@dataclass(frozen=True)
class TwoFactors(Layout):
    """What the two-factor layouts share: everything but their matrix view.

    ``to_matrix`` serves moments of the weight too, ``to_matrices`` those of the factors.
    """

    @abc.abstractmethod
    def weight_shape(self, left: Shape, right: Shape) -> Shape:
        """The shape of the weight that factors stand for.

        Args:
            left: The shape of the left factor.
            right: The shape of the right factor.

        Returns:
            The shape of the weight.
        """

    @abc.abstractmethod
    def to_matrices(self, factors: Factors) -> Factors:
        """The factors as matrices.

        Args:
            factors: (left, right).

        Returns:
            B [g, m, r] and A [g, r, n], with B A the matrix view of the weight.
        """

    @abc.abstractmethod
    def from_matrices(self, matrices: Factors, weight: Shape) -> Factors:
        """The inverse of ``to_matrices``.

        Args:
            matrices: B [g, m, r] and A [g, r, n].
            weight: The shape of the weight.

        Returns:
            (left, right).
        """

    def split(self, weight: Tensor, rank: int, last: Factors = ()) -> Factors:
        """The best factors per group: ‖W − B A‖_F is at most 1.001 × √(Σ_{i>r} σ_i²), or rounding where that is zero.

        Args:
            weight: The weight.
            rank: The rank r.
            last: (V,) of ``start`` or of ``followed``, of some steps ago: the cut then costs several times less.

        Returns:
            (left, right), balanced: B = U S^½, A = S^½ Vᵀ.
        """
        return self.from_matrices(truncate(self.to_matrix(weight), rank, *last[:1]), tuple(weight.shape))

    def start(self, factors: Factors) -> Factors:
        """(V,): what spans the rows of B A, or its columns where there are fewer of them.

        Args:
            factors: (left, right).

        Returns:
            (V [g, min(m, n), r],); empty where the matrix is so small that a cut from nothing costs little.
        """
        B, A = self.to_matrices(factors)
        if min(B.shape[-2], A.shape[-1]) <= SMALL:
            return ()
        return (A.mT if B.shape[-2] >= A.shape[-1] else B,)

    def followed(self, weight: Tensor, rank: int, last: Factors = ()) -> tuple[Tensor, Factors]:
        """X V Vᵀ and (V,): X is the matrix view with n ≤ m, or its transpose, V its top right singular vectors.

        Args:
            weight: The weight; finite, of float32 at least.
            rank: The rank r.
            last: (V,) of some steps ago, to go on from; of another rank, or empty, it is found anew.

        Returns:
            What a cut keeps, in the shape of the weight, and (V [g, n, r],).
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
