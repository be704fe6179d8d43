"""Layouts of convolutions as tensors: Tucker-2 (arXiv 1511.06530) and CP (arXiv 1412.6553).

Both are of convolutions in one group; others take the channel layout. No closed form gives the best factors: they are
found by alternating least squares in float64, from the singular vectors of the unfoldings. The shapes are those of the
table in ``choose``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..ops import ConvOp, Op, Shape
from .base import Factors, Layout, shapes_of
from .svd import next_basis

# Of alternating least squares: Tucker starts close to its optimum, CP does not.
_TUCKER_SWEEPS, _CP_SWEEPS = 8, 60
_CP_FOLLOWING = 2  # from the factors of a few steps ago: 16 r FLOPs a number of W


@dataclass(frozen=True)
class TensorLayout(Layout):
    """What both share: the channel view as their spectrum."""

    @classmethod
    def for_op(cls, op: Op) -> TensorLayout:
        return cls()

    def serves(self, op: Op) -> bool:
        return isinstance(op, ConvOp) and op.groups == 1

    def matrix_shape(self, weight: Shape) -> tuple[int, int]:
        return weight[0], math.prod(weight[1:])

    def to_matrix(self, weight: Tensor) -> Tensor:
        return weight.reshape(1, weight.shape[0], -1)

    def from_matrix(self, matrix: Tensor, weight: Shape) -> Tensor:
        return matrix.reshape(weight)


@dataclass(frozen=True)
class TuckerLayout(TensorLayout):
    """1×1 to fewer channels, k×k among them, 1×1 to all (Tucker-2, arXiv 1511.06530).

    Of a weight [m, n, *k] the rank r of at most max(m, n) stands for ⌈r · m / max(m, n)⌉ output and
    ⌈r · n / max(m, n)⌉ input channels of the k×k stage.
    """

    name: ClassVar[str] = "tucker"
    factor_names: ClassVar[tuple[str, ...]] = ("left", "core", "right")

    def max_rank(self, weight: Shape) -> int:
        return max(weight[:2])

    def channels(self, weight: Shape, rank: int) -> tuple[int, int]:
        """Output and input channels of the k×k stage.

        Args:
            weight: The shape of the weight, [m, n, *k].
            rank: The rank r.

        Returns:
            (outputs, inputs).
        """
        m, n = weight[:2]
        return -(-rank * m // max(m, n)), -(-rank * n // max(m, n))

    def terms(self, weight: Shape, rank: int) -> int:
        return math.prod(self.channels(weight, rank))

    def factor_shapes(self, weight: Shape, rank: int) -> tuple[Shape, ...]:
        m, n, *kernel = weight
        r, s = self.channels(weight, rank)
        ones = tuple(1 for _ in kernel)
        return (m, r, *ones), (r, s, *kernel), (s, n, *ones)

    def stages(self, op: Op, rank: int) -> tuple[tuple[Op, int], ...]:
        assert isinstance(op, ConvOp)
        return (op.pointwise, 2), (op, 1), (op.pointwise, 0)

    def join_flops(self, weight: Shape, rank: int) -> int:
        (m, r, *_), (_, s, *kernel), (_, n, *_) = self.factor_shapes(weight, rank)
        per_tap = m * s * (r + n) if m >= n else r * n * (s + m)
        return 2 * math.prod(kernel) * per_tap

    def join(self, factors: Factors) -> Tensor:
        """The core times the outer factor of more channels, then times the other: the order that costs less.

        Args:
            factors: (left, core, right).

        Returns:
            The weight [m, n, *k].
        """
        left, core, right = factors[0].flatten(1), factors[1], factors[2].flatten(1)
        if left.shape[0] >= right.shape[1]:
            return torch.einsum("ms...,sn->mn...", torch.einsum("mr,rs...->ms...", left, core), right)
        return torch.einsum("mr,rn...->mn...", left, torch.einsum("rs...,sn->rn...", core, right))

    def inner(self, one: Factors, other: Factors) -> Tensor:
        """⟨W, W'⟩ by products of the outer factors, [r, r] and [s, s]: no tensor is larger than the core.

        Args:
            one: The factors of W.
            other: The factors of W'.

        Returns:
            A tensor of one number.
        """
        (L, C, R), (left, core, right) = one, other
        outputs, inputs = left.flatten(1).T @ L.flatten(1), right.flatten(1) @ R.flatten(1).T
        return (torch.einsum("ar,rs...,bs->ab...", outputs, C, inputs) * core).sum()

    @torch.no_grad()
    def split(self, weight: Tensor, rank: int, last: Factors = ()) -> Factors:
        """The core in the best bases of the channels; the norm is spread evenly over the factors.

        Args:
            weight: The weight [m, n, *k].
            rank: The rank r.
            last: Not looked at.

        Returns:
            (left, core, right).
        """
        U, V = self._bases(weight, rank)
        core = torch.einsum("mn...,mr,ns->rs...", weight.double(), U, V)
        ones = [1] * (weight.ndim - 2)
        return _balanced((U.reshape(*U.shape, *ones), core, V.T.reshape(*V.T.shape, *ones)), weight)

    def followed(self, weight: Tensor, rank: int, last: Factors = ()) -> tuple[Tensor, Factors]:
        """W projected on both bases of its channels, W ×₁ U Uᵀ ×₂ V Vᵀ, and the bases.

        Args:
            weight: The weight [m, n, *k]; finite, of float32 at least.
            rank: The rank.
            last: (U, V) of some steps ago, to go on from; of another rank, or empty, they are found anew.

        Returns:
            What a cut keeps, in the shape of the weight, and (U [m, r], V [n, s]).
        """
        m, n = weight.shape[:2]
        r, s = self.channels(tuple(weight.shape), rank)
        if shapes_of(last) == ((m, r), (n, s)):
            U, V = last
            U = next_basis(torch.einsum("mn...,ns->s...m", weight, V).flatten(0, -2), U)
            V = next_basis(torch.einsum("mn...,mr->r...n", weight, U).flatten(0, -2), V)
        else:
            U, V = (each.to(weight.dtype) for each in self._bases(weight, rank))
        core = torch.einsum("mn...,mr,ns->rs...", weight, U, V)
        return torch.einsum("mr,rs...,ns->mn...", U, core, V), (U, V)

    def _bases(self, weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """U [m, r] and V [n, s] by higher-order orthogonal iteration, in float64."""
        r, s = self.channels(tuple(weight.shape), rank)
        W = weight.double().flatten(2)
        V = _top(W.transpose(0, 1).flatten(1), s)
        for _ in range(_TUCKER_SWEEPS):
            U = _top(torch.einsum("mnk,ns->msk", W, V).flatten(1), r)
            V = _top(torch.einsum("mnk,mr->nrk", W, U).flatten(1), s)
        return U, V


@dataclass(frozen=True)
class CPLayout(TensorLayout):
    """1×1 to r channels, then along each axis of the kernel by itself, then 1×1 to all (CP, arXiv 1412.6553).

    The weight is a sum of r products of vectors, one for each of its axes: few parameters, and not exact at any useful
    rank.
    """

    name: ClassVar[str] = "cp"
    exact: ClassVar[bool] = False
    factor_names: ClassVar[tuple[str, ...]] = ("left", "along", "across", "right")

    def serves(self, op: Op) -> bool:
        return super().serves(op) and isinstance(op, ConvOp) and len(op.stride) == 2

    def factor_shapes(self, weight: Shape, rank: int) -> tuple[Shape, ...]:
        m, n, k1, k2 = weight
        return (m, rank, 1, 1), (rank, 1, k1, 1), (rank, 1, 1, k2), (rank, n, 1, 1)

    def stages(self, op: Op, rank: int) -> tuple[tuple[Op, int], ...]:
        assert isinstance(op, ConvOp)
        return (op.pointwise, 3), (op.depthwise([0], rank), 1), (op.depthwise([1], rank), 2), (op.pointwise, 0)

    def join(self, factors: Factors) -> Tensor:
        left, along, across, right = factors
        shapes = left[:, :, 0, 0], along[:, 0, :, 0], across[:, 0, 0, :], right[:, :, 0, 0]
        return torch.einsum("mr,rh,rw,rn->mnhw", *shapes)

    def inner(self, one: Factors, other: Factors) -> Tensor:
        """⟨W, W'⟩ = Σ_ij Π over the axes of ⟨vector i of one, vector j of the other⟩.

        Args:
            one: The factors of W.
            other: The factors of W'.

        Returns:
            A tensor of one number.
        """
        mine, its = ((left.transpose(0, 1), *others) for left, *others in (one, other))
        grams = [a.flatten(1) @ b.flatten(1).T for a, b in zip(mine, its, strict=True)]
        return math.prod(grams[1:], start=grams[0]).sum()

    @torch.no_grad()
    def split(self, weight: Tensor, rank: int, last: Factors = ()) -> Factors:
        """Factors by alternating least squares from the singular vectors along each axis.

        Args:
            weight: The weight [m, n, k1, k2].
            rank: The rank r.
            last: What ``followed`` gave some steps ago, to be fitted to the weight once more.

        Returns:
            (left, along, across, right).
        """
        if last:
            return self.followed(weight, rank, last)[1]
        return self._fitted(weight, [_start(weight.double(), axis, rank) for axis in range(4)], _CP_SWEEPS)

    @torch.no_grad()
    def followed(self, weight: Tensor, rank: int, last: Factors = ()) -> tuple[Tensor, Factors]:
        """The product of factors that are fitted further, and those.

        Args:
            weight: The weight [m, n, k1, k2]; finite, of float32 at least.
            rank: The rank r.
            last: The factors of some steps ago, to go on from; of another rank, or empty, they are found anew.

        Returns:
            What a cut keeps, in the shape of the weight, and the factors.
        """
        if shapes_of(last) == self.factor_shapes(tuple(weight.shape), rank):
            left, along, across, right = (each.double() for each in last)
            axes = [left[:, :, 0, 0], right[:, :, 0, 0].T, along[:, 0, :, 0].T, across[:, 0, 0, :].T]
            factors = self._fitted(weight, axes, _CP_FOLLOWING)
        else:
            factors = self.split(weight, rank)
        return self.join(factors), factors

    def _fitted(self, weight: Tensor, axes: list[Tensor], sweeps: int) -> Factors:
        """Alternating least squares from the columns along each axis, in float64, as the systems may be nearly
        singular; then each vector of a product is brought to the same length.
        """
        W = weight.double()
        if not bool(W.any()):
            # One zero factor of a zero weight, as the others have to pass gradients on.
            return self._folded([torch.zeros_like(axes[0]), *axes[1:]], weight)
        for axis in [*range(4)] * sweeps:
            others = [axes[i] for i in range(4) if i != axis]
            gram = math.prod((each.T @ each for each in others[1:]), start=others[0].T @ others[0])
            subscripts = ",".join(f"{'mnhw'[i]}r" for i in range(4) if i != axis)
            target = torch.einsum(f"mnhw,{subscripts}->{'mnhw'[axis]}r", W, *others)
            # Products that come to be alike make the system singular: a little holds each column to what it was, so
            # that a weight of this rank stays as it is.
            little = 1e-9 * gram.diagonal().mean()
            gram.diagonal().add_(little)
            axes[axis] = torch.linalg.solve(gram, (target + little * axes[axis]).T).T
        lengths = [each.norm(dim=0).clamp_min(1e-30) for each in axes]
        each_length = math.prod(lengths[1:], start=lengths[0]) ** 0.25
        return self._folded([each / length * each_length for each, length in zip(axes, lengths, strict=True)], weight)

    def _folded(self, axes: list[Tensor], like: Tensor) -> Factors:
        """The vectors along each axis, one a column, as kernels."""
        A, N, H, K = axes
        factors = A[:, :, None, None], H.T[:, None, :, None], K.T[:, None, None, :], N.T[:, :, None, None]
        return tuple(factor.to(like.dtype).contiguous() for factor in factors)


def _top(matrix: Tensor, count: int) -> Tensor:
    """Orthonormal columns that span the top left singular vectors."""
    vectors: Tensor = torch.linalg.eigh(matrix @ matrix.T)[1]
    return vectors.flip(-1)[:, :count].contiguous()


def _start(W: Tensor, axis: int, rank: int) -> Tensor:
    """Columns to begin with along an axis: singular vectors of its unfolding, and fixed random ones beyond those."""
    unfolded = W.movedim(axis, 0).flatten(1)
    vectors = _top(unfolded, min(rank, unfolded.shape[0]))
    if vectors.shape[1] == rank:
        return vectors
    more = torch.randn(unfolded.shape[0], rank - vectors.shape[1], generator=torch.Generator().manual_seed(0))
    return torch.cat([vectors, more.to(W)], dim=1)


def _balanced(factors: Factors, like: Tensor) -> Factors:
    """The factors of the same product with equal norms, in the dtype of the weight."""
    norms = [factor.norm().clamp_min(1e-30) for factor in factors]
    each = math.prod(float(norm) for norm in norms) ** (1 / len(norms))
    return tuple(
        (factor / norm * each).to(like.dtype).contiguous() for factor, norm in zip(factors, norms, strict=True)
    )
