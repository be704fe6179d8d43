"""Optimizer moments through a multilinear map W = f(θ_1, ..., θ_k), such as the product of a weight's factors.

J_i = ∂W/∂θ_i does not depend on θ_i, and J_i δ is f with δ in the place of θ_i. Gradients obey G_i = J_iᵀ G with
G = ∂L/∂W, and so do first moments, which are sums of gradients: M_i = J_iᵀ M.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

Tensors: TypeAlias = tuple[Tensor, ...]
Map: TypeAlias = Callable[[Tensors], Tensor]
Inner: TypeAlias = Callable[[Tensors, Tensors], Tensor]

# Of conjugate gradients. Tucker factors take about 60, CP factors 100 to 300, the last of them for directions of W that
# the factors hardly have.
_STEPS = 300
_NOISE = 1e-9  # of their gradient, in parts of the first one: JᵀJ shows half of the digits of float64


def pulled_back(f: Map, factors: Tensors, at_weight: Tensor) -> Tensors:
    """(J_1ᵀ M, ..., J_kᵀ M): what a gradient or a first moment M at the weight is at each of the factors.

    At the squares of the factors it takes a second moment V over, entries of G being uncorrelated: (J_i∘J_i)ᵀ V where
    an entry of J_i is one product of others, as for two factors and for CP. Where it is a sum of products, as at the
    outer factors of Tucker, their cross terms are left out, which cancel where V is even over the orthogonal rows that
    a cut makes.
    """
    pull = torch.func.vjp(lambda *each: f(each), *factors)[1]
    return tuple(pull(at_weight))


@torch.no_grad()
def first_moment(f: Map, inner: Inner, factors: Tensors, moments: Tensors) -> Tensor:
    """The M that best explains the first moments of all factors: Σ_i ‖J_iᵀ M − M_i‖² is least, and then ‖M‖.

    Where M_i = J_iᵀ M holds for some M, the result reproduces all M_i, and is the part of M that the factors see.
    M = (Jᵀ)⁺ (M_1, ..., M_k) by conjugate gradients (CGLS) in float64: begun at zero, they stay in the range of J,
    whence the least norm, as M = J δ. What they have not reached in the end is what would take the largest M to explain
    the least. inner(a, b) = ⟨f(a), f(b)⟩ may spare them every tensor of the size of W, as JᵀJ δ is its gradient.
    """
    exact, residual = (tuple(each.double() for each in tensors) for tensors in (factors, moments))

    def replaced(at_factors: Tensors) -> list[Tensors]:
        return [(*exact[:i], each, *exact[i + 1 :]) for i, each in enumerate(at_factors)]

    def gram(at_factors: Tensors) -> Tensors:
        """JᵀJ δ: the gradient of ⟨f(θ), J δ⟩ at θ, J δ held fixed."""

        def along(*each: Tensor) -> Tensor:
            return torch.stack([inner(each, other) for other in replaced(at_factors)]).sum()

        return tuple(torch.func.grad(along, argnums=tuple(range(len(exact))))(*exact))

    delta = tuple(torch.zeros_like(each) for each in residual)
    direction, image = residual, gram(residual)
    size = _dot(residual, image)
    enough = max(torch.finfo(factors[0].dtype).eps, _NOISE) ** 2 * size
    for _ in range(_STEPS):
        if size <= enough:
            break
        length = size / _dot(image, image)
        delta = _plus(delta, length, direction)
        residual = _plus(residual, -length, image)
        more, last = gram(residual), size
        size = _dot(residual, more)
        direction, image = _plus(residual, size / last, direction), _plus(more, size / last, image)
    return torch.stack([f(each) for each in replaced(delta)]).sum(0).to(factors[0].dtype)


def _dot(a: Tensors, b: Tensors) -> float:
    return float(sum((x * y).sum() for x, y in zip(a, b, strict=True)))


def _plus(a: Tensors, scale: float, b: Tensors) -> Tensors:
    return tuple(x + scale * y for x, y in zip(a, b, strict=True))


def second_moment(f: Map, factors: Tensors, moments: Tensors, ones: Sequence[Sequence[int]]) -> Tensor:
    """The second moment V = c · f(u_1, ..., u_k) of rank one whose sums over each factor are the given ones.

    ones: the factors' shapes at rank one. u_i is V_i summed over the ranks: for V = a ⊗ b ⊗ ..., what of it has the
    axes of θ_i, up to a number. c makes Σ V_i / Σ V'_i one in the geometric mean over i, V'_i being V pulled back at
    the squares; for two factors c = 1 / √(Σ ρ_i ‖B_i‖² · Σ κ_j ‖A_j‖²). The inverse of ``pulled_back`` at the squares
    for a V of rank one; far off entry by entry otherwise.
    """
    exact, squares = (tuple(each.double() for each in tensors) for tensors in (factors, moments))
    V = f(tuple(each.sum_to_size(shape) for each, shape in zip(squares, ones, strict=True)))
    back = pulled_back(f, tuple(each.square() for each in exact), V)
    given, got = (torch.stack([each.sum() for each in tensors]) for tensors in (squares, back))
    scale = (given / got).log().mean().exp()
    return torch.where((got > 0).all(), V * scale, 0).to(factors[0].dtype)


# The same for a product of two matrices, in closed form.


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
    moment: Tensor = (P @ inside + beyond_P) @ Qh + P @ beyond_Q
    return moment


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
