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

# Of conjugate gradients. Tucker factors take about 60, CP factors 100 to 300, the last of them for directions of W that
# the factors hardly have.
_STEPS = 300


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
def first_moment(f: Map, factors: Tensors, moments: Tensors) -> Tensor:
    """The M that best explains the first moments of all factors: Σ_i ‖J_iᵀ M − M_i‖² is least, and then ‖M‖.

    Where M_i = J_iᵀ M holds for some M, the result reproduces all M_i, and is the part of M that the factors see.
    M = (Jᵀ)⁺ (M_1, ..., M_k) by conjugate gradients (CGLS) in float64: begun at zero, they stay in the range of J,
    whence the least norm. What they have not reached in the end is what would take the largest M to explain the least.
    """
    exact, residual = (tuple(each.double() for each in tensors) for tensors in (factors, moments))

    def pushed(at_factors: Tensors) -> Tensor:
        terms = [f((*exact[:i], each, *exact[i + 1 :])) for i, each in enumerate(at_factors)]
        return torch.stack(terms).sum(0)

    gradient = pushed(residual)
    M, direction, size = torch.zeros_like(gradient), gradient, float(gradient.square().sum())
    enough = torch.finfo(factors[0].dtype).eps ** 2 * size
    for _ in range(_STEPS):
        if size <= enough:
            break
        step = pulled_back(f, exact, direction)
        length = size / float(sum(each.square().sum() for each in step))
        M = M + length * direction
        residual = tuple(old - length * each for old, each in zip(residual, step, strict=True))
        gradient, last = pushed(residual), size
        size = float(gradient.square().sum())
        direction = gradient + size / last * direction
    return M.to(factors[0].dtype)


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
