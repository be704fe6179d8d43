"""Matrices whose rows several processes have: cut, joined, and their moments moved, without any having all of one.

Each process has its rows W_i of W [m, n] with m ≥ n, its rows B_i of the left factor [m, r], and all of the right one,
A [r, n]. Sums over the processes do the rest, of n² + O(n r) numbers where W has m n:

    WᵀW = Σ W_iᵀ W_i gives V, the top right singular vectors, which one process computes and sends;   U S = W V by rows
    M_B = M Aᵀ and V_B = V (A²)ᵀ by rows,   M_A = Σ B_iᵀ M_i,   V_A = Σ (B_i²)ᵀ V_i

Back, W_i = B_i A. The moments there are those of ``moments_to_dense``, with B = Q R by the QR of each process's rows,
and of their R_i above one another (TSQR: Demmel, Grigori, Hoemmen and Langou, arXiv 0808.2664).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import TransitionError
from ..layouts import SMALL, Factors, Layout, LinearLayout, full_precision, gram_basis, told_apart
from ..processes import ALONE, Processes

_WHAT = "the cut of a weight by its rows"


@dataclass(frozen=True)
class Rows(LinearLayout):
    """``LinearLayout`` on this process's rows of the weight and of the left factor; every process calls it alike.

    processes: Those that have the rows. source: the one that decomposes.
    """

    processes: Processes = ALONE
    source: int = 0

    def summed(self, *tensors: Tensor) -> Sequence[Tensor]:
        """These, added up over the processes."""
        self.processes.sum_(tensors)
        return tensors

    @torch.no_grad()
    def split(self, weight: Tensor, rank: int) -> Factors:
        """As of the whole weight: ‖W − B A‖_F is at most 1.001 × √(Σ_{i>r} σ_i²), or rounding where that is zero."""
        with full_precision():
            X, unit = self._scaled(weight.float())
            V = self._right_basis(X, rank)
            P = X.to(V.dtype) @ V  # its rows of U S
            (squares,) = self.summed(P.square().sum(0))
            S = squares.sqrt()
            S = torch.maximum(S, torch.finfo(weight.dtype).eps * S.amax())
            root = torch.where(S > 0, S, 1).sqrt()
            return (P / root * unit**0.5).to(weight.dtype), (V * root * unit**0.5).mT.to(weight.dtype).contiguous()

    def followed(self, weight: Tensor, rank: int, last: Factors = ()) -> tuple[Tensor, Factors]:
        """The rows of W V Vᵀ, and (V,)."""
        if last and tuple(last[0].shape) == (1, weight.shape[-1], rank):
            V = last[0][0]
            (moved,) = self.summed(weight.mT @ (weight @ V))
            V = self.processes.from_one(
                self.source, lambda: torch.linalg.qr(moved).Q.contiguous(), TransitionError, _WHAT
            )
        else:
            V = self._right_basis(weight, rank).to(weight.dtype).contiguous()
        return (weight @ V) @ V.mT, (V[None],)

    def join(self, factors: Factors) -> Tensor:
        """B_i A; a process may have no row at all."""
        left, right = factors
        return left @ right

    def pulled_back(self, factors: Factors, at_weight: Tensor) -> Factors:
        """G_i Aᵀ and Σ B_iᵀ G_i."""
        B, A = factors
        (right,) = self.summed(B.mT @ at_weight)
        return at_weight @ A.mT, right

    def first_moment(self, factors: Factors, moments: Factors) -> Tensor:
        """The rows of ``moments_to_dense``."""
        (B, A), (M_B, M_A) = factors, moments
        Q, R = torch.linalg.qr(B)
        stacked, place = self._stacked(R)

        def decomposed() -> Factors:
            """P over the stacked R_i, and what does not depend on rows: B = P diag(b) Xᵀ, A = Y diag(a) Zᵀ."""
            over, top = torch.linalg.qr(stacked)
            U, b, Xh = torch.linalg.svd(top, full_matrices=False)
            Y, a, Zh = torch.linalg.svd(A, full_matrices=False)
            return over @ U, b, Xh, Y, a, Zh

        over, b, Xh, Y, a, Zh = self.processes.from_one(self.source, decomposed, TransitionError, _WHAT)
        P = Q @ over[place : place + len(R)]
        eps, tiny = torch.finfo(B.dtype).eps, torch.finfo(B.dtype).tiny
        b, a = (torch.where(each > eps * each.amax() * len(each), each, 0) for each in (b, a))
        (C1,) = self.summed(P.mT @ M_B @ Y)
        C2, size = Xh @ M_A @ Zh.mT, a.square() + b[:, None].square()
        inside = torch.where(size > 0, (C1 * a + b[:, None] * C2) / size.clamp_min(tiny), 0)
        beyond_P = (M_B @ Y - P @ C1) * torch.where(a > 0, 1 / a, 0)
        beyond_Q = (Xh @ M_A - C2 @ Zh) * torch.where(b > 0, 1 / b, 0)[:, None]
        moment: Tensor = (P @ inside + beyond_P) @ Zh + P @ beyond_Q
        return moment

    def second_moment(self, factors: Factors, moments: Factors) -> Tensor:
        """The rows of ρ κᵀ / S, as ``second_moments_to_dense`` has it."""
        (B, A), (V_B, V_A) = factors, moments
        rho, kappa = V_B.sum(-1, keepdim=True), V_A.sum(-2, keepdim=True)
        (S_rho,) = self.summed((rho * B.square().sum(-1, keepdim=True)).sum())
        S_kappa = (kappa * A.square().sum(-2, keepdim=True)).sum()
        S = (S_rho * S_kappa).sqrt()
        return torch.where(S > 0, rho * kappa / S.clamp_min(torch.finfo(V_B.dtype).tiny), 0)

    def _scaled(self, W: Tensor) -> tuple[Tensor, float]:
        """W over a power of two, hence exactly, with entries near 1: its squares neither vanish nor overflow."""
        largest = max(self.processes.gathered(float(W.abs().max()) if W.numel() else 0.0))
        unit = 2.0 ** min(int(torch.frexp(torch.tensor(largest)).exponent), 127)
        return W / unit, unit

    def _right_basis(self, W: Tensor, rank: int) -> Tensor:
        """V [n, r] with ‖W − W V Vᵀ‖ within 1.001 of the least: of the Gram matrix in float32 where that can tell, else
        in float64.
        """
        if W.shape[-1] > SMALL:
            V = self._gram_basis(W, rank)
            if V is not None:
                kept, total = self.summed((W @ V).square().sum(-2), W.square().sum())
                if told_apart(kept, total):
                    return V
        V = self._gram_basis(W.double(), rank)
        if V is None:
            raise TransitionError("a weight in parts has no singular vectors that could be found: look for its values")
        return V

    def _gram_basis(self, W: Tensor, rank: int) -> Tensor | None:
        (gram,) = self.summed(W.mT @ W)
        return self.processes.from_one(self.source, lambda: gram_basis(gram, rank), TransitionError, _WHAT)

    def _stacked(self, R: Tensor) -> tuple[Tensor, int]:
        """The R of every process, one above the other, and where that of this one begins."""
        heights = self.processes.gathered(len(R))
        place = sum(heights[: self.processes.rank])
        stacked = R.new_zeros(sum(heights), R.shape[-1])
        stacked[place : place + len(R)] = R
        self.summed(stacked)
        return stacked, place


def error_of(layout: Layout, now: Tensor, old: Tensor) -> float:
    """‖W' − W‖_F / ‖W‖_F, of all rows where the layout is one of those."""
    if isinstance(layout, Rows):
        squares = [each.double().square().sum() for each in (now - old, old)]
        lost, size = (each.sqrt() for each in layout.summed(*squares))
    else:
        lost, size = (torch.linalg.vector_norm(each.float()) for each in (now - old, old))
    return float(lost / size.clamp_min(1e-30))
