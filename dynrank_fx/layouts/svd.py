"""The mathematics of low rank: the best factors of a matrix, and bases that follow a matrix which changes.

Shapes: g groups, m rows, n columns, r rank. W [g, m, n] ≈ B A with B (left) [g, m, r] and A (right) [g, r, n].
G = ∂L/∂W gives G_B = G Aᵀ and G_A = Bᵀ G.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# Up to this many columns a float64 SVD costs milliseconds; above it the Gram matrix's eigenvectors are several
# times faster (docs/measured.md has the figures).
SMALL = 128
# Energy of the discarded directions, in parts of the largest eigenvalue, below which the Gram matrix in float32 cannot
# tell them apart: its rounding costs up to about 1e-5 of that eigenvalue, and 2e-3 of the tail is what 1.001 allows.
_FLOAT32_TAIL = 1e-2


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in float32, where its own type is a shorter one."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """float32 products in float32: TF32 and bfloat16 have too few bits for a Gram matrix, or for a weight that stays.

    The process-wide flags are put back as they were.
    """
    # Any: torch does not say what these are
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def gram_basis(gram: Tensor, rank: int) -> Tensor | None:
    """The top ``rank`` eigenvectors of WᵀW as columns [.., n, r], or None where the eigensolver did not converge."""
    try:
        _, vectors = torch.linalg.eigh(gram)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return None
    V = vectors[..., -rank:].flip(-1)
    return V if bool(torch.isfinite(V).all()) else None


def told_apart(kept: Tensor, total: Tensor) -> bool:
    """Whether the eigenvectors of a Gram matrix in float32 are near enough to the best ones, by the energy that they
    keep [.., r] of that of W.
    """
    return bool((total - kept.sum(-1) > _FLOAT32_TAIL * kept.amax(-1)).all())


def right_basis(W: Tensor, rank: int) -> Tensor:
    """Orthonormal V [g, n, r], n ≤ m, with ‖W − W V Vᵀ‖ within 1.001 of the least, or rounding where that is zero."""
    n = W.shape[-1]
    if n > SMALL and W.dtype != torch.float64:
        V = gram_basis(W.mT @ W, rank)
        if V is not None and told_apart((W @ V).square().sum(-2), W.square().sum((-2, -1))):
            return V
        V = gram_basis(W.double().mT @ W.double(), rank)
        if V is not None:
            return V
    # Last resort and small case: exact, and on the CPU, where it always converges.
    Vh: Tensor = torch.linalg.svd(W.double().cpu(), full_matrices=False).Vh
    return Vh[..., :rank, :].mT.to(W.device)


def next_basis(W: Tensor, V: Tensor) -> Tensor:
    """A right basis of a W that has moved since V [g, n, r] was one: a step of subspace iteration."""
    Q: Tensor = torch.linalg.qr(W.mT @ (W @ V)).Q
    return Q.contiguous()


@torch.no_grad()
def truncate(W: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Best rank-r factors of W [g, m, n], balanced: B = U S^½ [g, m, r], A = S^½ Vᵀ [g, r, n].

    ‖W − BA‖_F is at most 1.001 × √(Σ_{i>r} σ_i²) (Eckart–Young), or rounding where that is zero. Any floating dtype;
    the work is done in float32 at least and falls back to float64 where float32 would not reach the bound.
    """
    m, n = W.shape[-2:]
    if m < n:
        left, right = truncate(W.mT, rank)
        return right.mT.contiguous(), left.mT.contiguous()
    with full_precision():
        X, scale = _scaled(W if W.dtype == torch.float64 else W.float())
        V = right_basis(X, rank)
        P = X.to(V.dtype) @ V  # = U S, so its column norms are the singular values
        S = torch.linalg.vector_norm(P, dim=-2, keepdim=True)
        # A direction with σ = 0 keeps a small right row, and a zero matrix whole ones: with both factors zero it could
        # never train again.
        S = torch.maximum(S, torch.finfo(W.dtype).eps * S.amax(-1, keepdim=True))
        root, unit = torch.where(S > 0, S, 1).sqrt(), scale.to(V.dtype).sqrt()
        return (P / root * unit).to(W.dtype), (V.mT * root.mT * unit).to(W.dtype)


def _scaled(W: Tensor) -> tuple[Tensor, Tensor]:
    """W over a power of two per group, hence exactly, with entries near 1: its squares neither vanish nor overflow."""
    exponent = torch.frexp(W.abs().amax((-2, -1), keepdim=True)).exponent
    scale = torch.ldexp(torch.ones_like(exponent, dtype=W.dtype), exponent.clamp_max(127))
    return W / scale, scale
