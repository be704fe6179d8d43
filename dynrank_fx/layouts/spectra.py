"""Singular values σ_1 ≥ σ_2 ≥ … of weights, and the ranks that are read off them.

Effective rank: exp of the entropy of σ_i / Σσ (Roy and Vetterli, "The effective rank", EUSIPCO 2007). Stable rank:
‖W‖_F² / σ_1² (Rudelson and Vershynin, arXiv math/0503442). Energy: Σσ².
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from ..errors import PlanError


@torch.no_grad()
def singular_values(W: Tensor) -> Tensor:
    """Singular values of W [g, m, n], largest first: [g, min(m, n)] in float64, on the CPU.

    On a GPU by the Gram matrix, to 1e-8 of the largest: its SVD is tens of times slower there, and so is a CPU's.
    """
    X = W.double()
    if X.is_cuda:
        with contextlib.suppress(torch.linalg.LinAlgError):  # type: ignore[attr-defined]
            values: Tensor = torch.linalg.eigvalsh(X @ X.mT if X.shape[-2] <= X.shape[-1] else X.mT @ X)
            return values.flip(-1).clamp_min(0).sqrt().cpu()
    return torch.linalg.svdvals(X.cpu())  # type: ignore[no-any-return]


@torch.no_grad()
def product_singular_values(B: Tensor, A: Tensor) -> Tensor:
    """Singular values of BA without forming it: QR of B and of Aᵀ, then those of the r×r product. [g, min(m, n, r)],
    float64, CPU.
    """
    R_B = torch.linalg.qr(B.double(), mode="r").R
    R_A = torch.linalg.qr(A.mT.double(), mode="r").R
    return singular_values(R_B @ R_A.mT)


def effective_rank(s: Tensor) -> float:
    """The effective rank: exp of the entropy of σ_i / Σσ (Roy and Vetterli, EUSIPCO 2007).

    Args:
        s: Singular values, of any shape; those of several groups count together.

    Returns:
        A number from 1 to the number of singular values: k equal ones give k. 0 for zeros.
    """
    total = _checked(s).sum()
    if total <= 0:
        return 0.0
    p = s[s > 0] / total
    return float(torch.exp(-(p * p.log()).sum()))


def stable_rank(s: Tensor) -> float:
    """The stable rank ‖W‖_F² / σ_1² = Σ σ_i² / σ_1² (arXiv math/0503442).

    Args:
        s: Singular values, of any shape.

    Returns:
        A number of at most the rank, which small singular values do not move. 0 for a zero matrix.
    """
    _checked(s)
    return float(s.square().sum() / s.max().square()) if bool(s.max() > 0) else 0.0


def _checked(s: Tensor) -> Tensor:
    """The singular values themselves. Raises PlanError for what are none."""
    if not isinstance(s, Tensor) or not bool(torch.isfinite(s).all()):
        raise PlanError(f"{s!r} are no singular values: give a tensor of finite numbers")
    return s


def energy_rank(s: Tensor, share: float) -> int:
    """The least r at which Σ_{i≤r} σ_i² ≥ share · Σ σ_i² in every group.

    Args:
        s: Singular values by group, [g, k], largest first.
        share: The share of the energy to keep, from 0 to 1.

    Returns:
        The rank, from 1 to k.
    """
    energy = s.square().cumsum(-1)
    missing = energy < share * energy[..., -1:] * (1 - 1e-12)  # rounding must not cost a rank where share is 1
    return int(missing.sum(-1).max()) + 1
