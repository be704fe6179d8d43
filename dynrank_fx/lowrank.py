"""The mathematics of low rank: truncation, spectra, and how optimizer moments change coordinates.

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
# times faster (the README's table has the figures).
_SMALL = 128
# Energy of the discarded directions, in parts of the largest eigenvalue, below which the Gram matrix in float32 cannot
# tell them apart: its rounding costs up to about 1e-5 of that eigenvalue, and 2e-3 of the tail is what 1.001 allows.
_FLOAT32_TAIL = 1e-2


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """float32 products in float32: TF32 and bfloat16 have too few bits for a Gram matrix, or for a weight that stays.

    The process-wide flags are put back as they were.
    """
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def _gram_basis(W: Tensor, rank: int) -> Tensor | None:
    """The top ``rank`` eigenvectors of WᵀW as columns [g, n, r], or None where the eigensolver did not converge."""
    try:
        _, vectors = torch.linalg.eigh(W.mT @ W)
    except torch.linalg.LinAlgError:
        return None
    V = vectors[..., -rank:].flip(-1)
    return V if bool(torch.isfinite(V).all()) else None


def right_basis(W: Tensor, rank: int) -> Tensor:
    """Orthonormal V [g, n, r], n ≤ m, with ‖W − W V Vᵀ‖ within 1.001 of the least, or rounding where that is zero."""
    n = W.shape[-1]
    if n > _SMALL and W.dtype != torch.float64:
        V = _gram_basis(W, rank)
        if V is not None:
            kept = (W @ V).square().sum(-2)
            tail = W.square().sum((-2, -1)) - kept.sum(-1)
            if bool((tail > _FLOAT32_TAIL * kept.amax(-1)).all()):
                return V
        V = _gram_basis(W.double(), rank)
        if V is not None:
            return V
    # Last resort and small case: exact, and on the CPU, where it always converges.
    return torch.linalg.svd(W.double().cpu(), full_matrices=False).Vh[..., :rank, :].mT.to(W.device)


def next_basis(W: Tensor, V: Tensor) -> Tensor:
    """A right basis of a W that has moved since V [g, n, r] was one: a step of subspace iteration."""
    return torch.linalg.qr(W.mT @ (W @ V)).Q.contiguous()


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


@torch.no_grad()
def output_basis(W: Tensor, moment: Tensor, shrink: float, *, of_inputs: bool) -> tuple[Tensor, Tensor]:
    """The directions of the outputs y = W x by what they hold: V [g, m, k] orthonormal, and √λ [g, k], λ falling.

    moment: E[y yᵀ] [g, m, m], or E[x xᵀ] [g, n, n] where of_inputs, of centred y or x. With C = E[y yᵀ] = W E[x xᵀ] Wᵀ,
    min ‖y − y'‖² over y' = V_r V_rᵀ y is Σ_{i>r} λ_i, reached by the top eigenvectors of C. shrink: so large a share
    of W Wᵀ, at the trace of C, is added to C: what too few data leave open is then settled as by plain SVD. All in
    float64.
    """
    W, moment = W.double(), moment.double()
    values, Q = torch.linalg.eigh(moment)
    values = values.clamp_min(0)
    energy = ((W @ Q).square().sum(-2) * values).sum(-1) if of_inputs else values.sum(-1)
    scale = shrink * energy / W.square().sum((-2, -1)).clamp_min(torch.finfo(W.dtype).tiny)
    if of_inputs:
        # C + s W Wᵀ = W (E[x xᵀ] + s I) Wᵀ.
        return _left_basis(W @ (Q * (values + scale[..., None]).sqrt()[..., None, :]))
    if shrink:
        values, Q = torch.linalg.eigh(moment + scale[..., None, None] * (W @ W.mT))
    return Q.flip(-1), values.flip(-1).clamp_min(0).sqrt()


# Up to this many rows or columns the SVD of Y itself is cheap.
_DIRECT = 512


def _left_basis(Y: Tensor) -> tuple[Tensor, Tensor]:
    """Left singular vectors and singular values, float64; of a large matrix by the Gram matrix of its short side."""
    m, n = Y.shape[-2:]
    if min(m, n) <= _DIRECT:
        U, S, _ = torch.linalg.svd(Y, full_matrices=False)
        return U, S
    if m <= n:
        values, V = torch.linalg.eigh(Y @ Y.mT)
        return V.flip(-1), values.flip(-1).clamp_min(0).sqrt()
    _, V = torch.linalg.eigh(Y.mT @ Y)
    U, R = torch.linalg.qr(Y @ V.flip(-1))  # the columns are orthogonal up to rounding, which QR takes away
    return U * R.diagonal(dim1=-2, dim2=-1).sign()[..., None, :], R.diagonal(dim1=-2, dim2=-1).abs()


@torch.no_grad()
def projected(W: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of V Vᵀ W, W [g, m, n], V [g, m, r] orthonormal, balanced column by row."""
    right = V.mT @ W.double()
    S = torch.linalg.vector_norm(right, dim=-1, keepdim=True)
    S = torch.maximum(S, torch.finfo(W.dtype).eps * S.amax(-2, keepdim=True))
    root = torch.where(S > 0, S, 1).sqrt()
    return (V * root.mT).to(W.dtype), (right / root).to(W.dtype)


def _scaled(W: Tensor) -> tuple[Tensor, Tensor]:
    """W over a power of two per group, hence exactly, with entries near 1: its squares neither vanish nor overflow."""
    exponent = torch.frexp(W.abs().amax((-2, -1), keepdim=True)).exponent
    scale = torch.ldexp(torch.ones_like(exponent, dtype=W.dtype), exponent.clamp_max(127))
    return W / scale, scale


@torch.no_grad()
def singular_values(W: Tensor) -> Tensor:
    """Singular values of W [g, m, n], largest first: [g, min(m, n)] in float64, on the CPU.

    On a GPU by the Gram matrix, to 1e-8 of the largest: its SVD is tens of times slower there, and so is a CPU's.
    """
    X = W.double()
    if X.is_cuda:
        with contextlib.suppress(torch.linalg.LinAlgError):
            values = torch.linalg.eigvalsh(X @ X.mT if X.shape[-2] <= X.shape[-1] else X.mT @ X)
            return values.flip(-1).clamp_min(0).sqrt().cpu()
    return torch.linalg.svdvals(X.cpu())


@torch.no_grad()
def product_singular_values(B: Tensor, A: Tensor) -> Tensor:
    """Singular values of BA without forming it: QR of B and of Aᵀ, then those of the r×r product. [g, r], float64,
    CPU.
    """
    R_B = torch.linalg.qr(B.double(), mode="r").R
    R_A = torch.linalg.qr(A.mT.double(), mode="r").R
    return singular_values(R_B @ R_A.mT)


def effective_rank(s: Tensor) -> float:
    """exp of the entropy of the normalised singular values (of all groups together): k equal ones give k. 0 for
    zeros.
    """
    total = s.sum()
    if total <= 0:
        return 0.0
    p = s[s > 0] / total
    return float(torch.exp(-(p * p.log()).sum()))


def stable_rank(s: Tensor) -> float:
    """‖W‖_F² / σ_1²: at most the rank, and unmoved by small singular values. 0 for a zero matrix."""
    return float(s.square().sum() / s.max().square()) if bool(s.max() > 0) else 0.0


def energy_rank(s: Tensor, share: float) -> int:
    """The least r at which Σ_{i≤r} σ_i² ≥ share · Σ σ_i² in every group of s [g, k]."""
    energy = s.square().cumsum(-1)
    missing = energy < share * energy[..., -1:] * (1 - 1e-12)  # rounding must not cost a rank where share is 1
    return int(missing.sum(-1).max()) + 1


def moments_to_dense(M_B: Tensor, M_A: Tensor, B: Tensor, A: Tensor) -> Tensor:
    """The dense moment M [g, m, n] that best explains both factor moments (least squares, least norm).

    In the singular bases B = P diag(b) Xᵀ, A = Y diag(a) Qᵀ: inside, M_ij = (C1_ij a_j + b_i C2_ij) / (a_j² + b_i²)
    with C1 = Pᵀ M_B Y and C2 = Xᵀ M_A Q; outside, the parts of M_B beyond P and of M_A beyond Q, each through its own
    factor. Where M_B = M Aᵀ and M_A = Bᵀ M for some M, the result reproduces both exactly.
    """
    P, b, Xh = torch.linalg.svd(B, full_matrices=False)
    Y, a, Qh = torch.linalg.svd(A, full_matrices=False)
    eps = torch.finfo(B.dtype).eps
    # Directions the factors do not have carry no information about M: their inverse is taken as zero.
    b = torch.where(b > eps * b.amax(-1, keepdim=True) * b.shape[-1], b, 0)
    a = torch.where(a > eps * a.amax(-1, keepdim=True) * a.shape[-1], a, 0)
    C1, C2 = P.mT @ M_B @ Y, Xh @ M_A @ Qh.mT
    weight = a[..., None, :].square() + b[..., :, None].square()
    inside = torch.where(
        weight > 0,
        (C1 * a[..., None, :] + b[..., :, None] * C2) / weight.clamp_min(torch.finfo(B.dtype).tiny),
        0,
    )
    a_inverse = torch.where(a > 0, 1 / a, 0)
    b_inverse = torch.where(b > 0, 1 / b, 0)
    beyond_P = (M_B @ Y - P @ C1) * a_inverse[..., None, :]
    beyond_Q = (Xh @ M_A - C2 @ Qh) * b_inverse[..., :, None]
    return (P @ inside + beyond_P) @ Qh + P @ beyond_Q


def second_moments_to_dense(V_B: Tensor, V_A: Tensor, B: Tensor, A: Tensor) -> Tensor:
    """The rank-one V [g, m, n] = ρ κᵀ / S with V_B's row sums ρ and V_A's column sums κ; exact for a rank-one V.

    With V = row colᵀ: ρ_i = row_i Σ_j col_j ‖A_j‖², κ_j = col_j Σ_i row_i ‖B_i‖², and Σ_i ρ_i ‖B_i‖² = Σ_j κ_j ‖A_j‖²
    = S.
    """
    rho, kappa = V_B.sum(-1, keepdim=True), V_A.sum(-2, keepdim=True)
    S_rho = (rho * B.square().sum(-1, keepdim=True)).sum(-2, keepdim=True)
    S_kappa = (kappa * A.square().sum(-2, keepdim=True)).sum(-1, keepdim=True)
    S = (S_rho * S_kappa).sqrt()
    return torch.where(S > 0, rho * kappa / S.clamp_min(torch.finfo(V_B.dtype).tiny), 0)
