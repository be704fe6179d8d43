"""A right basis of a matrix by subspace iteration from one that was right before, and the proof that it is good enough.

Shapes: g groups, m rows, n columns (n ≤ m), r rank, l ≥ r columns of the basis. W [g, m, n], V [g, n, l] orthonormal.

A step is V ← orth(WᵀW V). What it reaches is bounded from what is known then. With P = W V, let θ_1 ≥ θ_2 ≥ … be the
eigenvalues of PᵀP, R = WᵀW V − V PᵀP the residual, and μ the largest eigenvalue of WᵀW beyond V. For every τ > μ,

    WᵀW − τ ≼ [PᵀP − τ + RᵀR / (τ − μ)] ⊕ 0        in the basis V and its complement,

so that by Ky Fan no r directions hold more energy than

    Σ_{i≤r} λ_i ≤ r τ + Σ_{i≤r} (θ_i − τ)₊ + ‖R‖_F² / (τ − μ).

The least of this over τ = θ_1 … θ_r, less Σ_{i≤r} θ_i, is what V may have missed. ‖R‖_F² is estimated by random probes,
and μ by power iteration on random vectors, both from below: hence the margins.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

Basis: TypeAlias = tuple[Tensor, Tensor]
"""V [g, n, r], the right singular vectors in their order, and P = W V [g, m, r]."""

_MISSED = 1e-3
"""Energy that may be missed, in parts of what a best cut discards: 1.001 allows 2e-3, and the margin is for the
estimates."""
_STEPS = 3  # with more of them the eigenvectors of the Gram matrix cost less
_PROBES = 8
_POWER = 4
_MARGIN = 1.2


def warm_basis(W: Tensor, rank: int, start: Tensor, eps: float) -> Basis | None:
    """The basis of a W that has moved since its right singular vectors lay near the span of ``start`` [g, n, l].

    eps: the rounding of W's entries. None where ‖W − W V Vᵀ‖ ≤ 1.001 × the least is not reached soon, or not proven,
    unless it is rounding.
    """
    total = _energy(W)
    rounding = max(eps, 16 * torch.finfo(W.dtype).eps) ** 2 * total
    V = _orthonormal(start.to(W.dtype))
    P = W @ V
    if start.shape[-1] == rank and bool((_tail(W, V, P, total) <= rounding).all()):  # as a landing has prepared it
        return _ritz(V, P)[1:]
    for _ in range(_STEPS):
        theta, V, P = _ritz(*_step(W, P))
        tail = _tail(W, V[..., :rank], P[..., :rank], total)
        missed = torch.where(tail <= rounding, 0, _missed(W, V, P, theta, rank) / tail)
        if bool((missed <= _MISSED).all()):
            return V[..., :rank], P[..., :rank]
        if not bool((missed <= 1).all()):  # too far away, or nothing known
            return None
    return None


def _step(W: Tensor, P: Tensor) -> Basis:
    V = _orthonormal(W.mT @ P)
    return V, W @ V


def _missed(W: Tensor, V: Tensor, P: Tensor, theta: Tensor, rank: int) -> Tensor:
    """What r directions could hold at most beyond the first r of V: [g], infinite where nothing is known."""
    X = _random(W, V.shape[0], _PROBES, V.shape[-1]) @ P.mT
    R = X @ W - X @ P @ V.mT
    residual = _MARGIN * _energy(R) / _PROBES
    edge = _MARGIN * _beyond(W, V)
    tau = theta[..., :rank]
    # Σ_{i≤r} (τ − θ_i)₊ for each τ, by the steps from one θ to the next: exactly zero at τ = θ_r.
    falls = (tau[..., :-1] - tau[..., 1:]) * torch.arange(rank - 1, 0, -1, device=W.device)
    below = torch.nn.functional.pad(falls.flip(-1).cumsum(-1).flip(-1), (0, 1))
    apart = tau - edge[..., None]
    bounds = torch.where(apart > 0, below + residual[..., None] / apart, torch.inf)
    return bounds.amin(-1)


def _beyond(W: Tensor, V: Tensor) -> Tensor:
    """The largest eigenvalue of WᵀW in the complement of V, from below: [g]."""
    X = _random(W, V.shape[0], _PROBES, V.shape[-2])  # as rows: so few columns would be multiplied slowly
    size = X.new_zeros(())
    for _ in range(_POWER):
        X = X - X @ V @ V.mT
        X = X / torch.linalg.vector_norm(X, dim=-1, keepdim=True).clamp_min(torch.finfo(X.dtype).tiny)
        X = X @ W.mT @ W
        size = torch.linalg.vector_norm(X - X @ V @ V.mT, dim=-1)
    return size.double().amax(-1)


def _ritz(V: Tensor, P: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues of PᵀP in float64, largest first, and V and P in the order of its eigenvectors."""
    theta, Q = torch.linalg.eigh(P.mT @ P)
    Q = Q.flip(-1)
    return theta.flip(-1).double().clamp_min(0), V @ Q, P @ Q


def _tail(W: Tensor, V: Tensor, P: Tensor, total: Tensor) -> Tensor:
    """‖W − P Vᵀ‖² by group, [g]: a difference of energies where that has digits enough."""
    tail = total - _energy(P)
    few = 1e4 * torch.finfo(W.dtype).eps * total
    return _energy(W - P @ V.mT) if bool((tail < few).any()) else tail


def _energy(X: Tensor) -> Tensor:
    return X.square().sum((-2, -1), dtype=torch.float64)


def _random(like: Tensor, *shape: int) -> Tensor:
    """The same numbers every time, so that a training repeats bit by bit; the global generators are not touched."""
    generator = torch.Generator(like.device).manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)


def _orthonormal(Y: Tensor) -> Tensor:
    """Orthonormal columns of the same span: by Cholesky twice, which are products, and by QR where that fails."""
    Q = Y / torch.linalg.vector_norm(Y, dim=-2, keepdim=True).clamp_min(torch.finfo(Y.dtype).tiny)
    for _ in range(2):
        gram = Q.mT @ Q
        L, failed = torch.linalg.cholesky_ex(gram)
        Q = torch.linalg.solve_triangular(L.mT, Q, upper=True, left=False)
    # The second time the columns are nearly orthonormal already, or the first was not good for anything.
    off = (gram - torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)).abs().amax()
    sound = bool((failed == 0).all() & (off < 0.1))
    return Q if sound else torch.linalg.qr(Y).Q  # type: ignore[no-any-return]
