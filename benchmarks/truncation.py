"""Truncated SVD of random matrices to a quarter of their rank: time and error against torch.linalg.svd.

Each matrix is cut anew, and as at a switch after the first: its factors have trained on as a full weight, which began
as their product, and the cut begins with what they have left. Last it is cut as a landing has prepared it, by the basis
of that: nothing beyond the rank is left.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from benchmarks.measuring import DEVICE
from benchmarks.result import Cell, Column, Table
from dynrank_fx.layouts import LinearLayout, svd
from dynrank_fx.timing import interleaved

COLUMNS = (
    Column("matrix"),
    Column("rank", spec=","),
    Column("change since the last cut", "%", ".0f"),
    Column("torch.linalg.svd", "ms", ".0f"),
    Column("ours", "ms", ".0f"),
    Column("torch.linalg.svd / ours", spec=".1f"),
    Column("error over the optimum", spec=".0e"),
)
DRIFTS = (0.03, 0.1, 0.2)  # norms of what full steps add, in parts of the weight's


def truncation(quick: bool) -> Table:
    shapes = ((256, 256), (512, 160)) if quick else ((1024, 1024), (4096, 1024), (2048, 2048))
    repeats = 2 if quick else 7
    rows = []
    torch.manual_seed(0)
    for m, n in shapes:
        W, rank = falling(m, n), min(m, n) // 4
        B, A = svd.truncate(W[None], rank)
        rows.append(row(W, rank, None, None, repeats))
        for drift in DRIFTS:
            step = falling(m, n)
            moved = B[0] @ A[0]
            moved += drift * moved.norm() / step.norm() * step
            rows.append(row(moved, rank, A.mT.bfloat16(), 100 * drift, repeats))
        landed, (V,) = LinearLayout().followed(moved, rank, (A.mT,))
        rows.append(row(landed, rank, V, "landed", repeats))
    note = "Cut anew where no change is given; after a landing the optimum, and the error, are rounding."
    return Table(COLUMNS, tuple(rows), note)


def row(W: Tensor, rank: int, start: Tensor | None, change: float | str | None, repeats: int) -> tuple[Cell, ...]:
    ours = partial(svd.truncate, W[None], rank, start)
    pair = interleaved(partial(torch.linalg.svd, W, full_matrices=False), ours, repeats=repeats, warmup=1)
    B, A = ours()
    error, best = (W.double() - B[0].double() @ A[0].double()).norm(), torch.linalg.svdvals(W.double())[rank:].norm()
    rounding = 16 * torch.finfo(W.dtype).eps * W.norm()
    excess = float(error / best - 1) if max(error, best) > rounding else None
    size = f"{W.shape[0]}×{W.shape[1]}"
    return size, rank, change, 1e3 * pair.first, 1e3 * pair.second, 1 / pair.ratio, excess


def falling(m: int, n: int) -> Tensor:
    """A random matrix whose spectrum falls as a trained weight's does, by a factor of 30 over its length."""
    W = torch.randn(m, n, device=DEVICE) / n**0.5
    scales = torch.logspace(0, -1.5, n, device=DEVICE)
    return W @ torch.diag(scales) @ torch.linalg.qr(torch.randn(n, n, device=DEVICE)).Q
