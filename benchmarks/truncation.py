"""Truncated SVD of random matrices to a quarter of their rank: time and error against torch.linalg.svd."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from benchmarks.measuring import DEVICE
from benchmarks.result import Column, Table
from dynrank_fx.layouts import svd
from dynrank_fx.timing import interleaved

COLUMNS = (
    Column("matrix"),
    Column("rank", spec=","),
    Column("torch.linalg.svd", "ms", ".0f"),
    Column("ours", "ms", ".0f"),
    Column("torch.linalg.svd / ours", spec=".1f"),
    Column("error over the optimum", spec=".0e"),
)


def truncation(quick: bool) -> Table:
    shapes = ((256, 256), (512, 128)) if quick else ((1024, 1024), (4096, 1024), (2048, 2048))
    rows = []
    for m, n in shapes:
        W, rank = falling(m, n), min(m, n) // 4
        pair = interleaved(
            partial(torch.linalg.svd, W, full_matrices=False),
            partial(svd.truncate, W[None], rank),
            repeats=2 if quick else 7,
            warmup=1,
        )
        B, A = svd.truncate(W[None], rank)
        best = torch.linalg.svdvals(W.double())[rank:].norm()
        excess = float((W.double() - B[0].double() @ A[0].double()).norm() / best - 1)
        rows.append((f"{m}×{n}", rank, 1e3 * pair.first, 1e3 * pair.second, 1 / pair.ratio, excess))
    return Table(COLUMNS, tuple(rows))


def falling(m: int, n: int) -> Tensor:
    """A random matrix whose spectrum falls as a trained weight's does, by a factor of 30 over its length."""
    torch.manual_seed(0)
    W = torch.randn(m, n, device=DEVICE) / n**0.5
    scales = torch.logspace(0, -1.5, n, device=DEVICE)
    return W @ torch.diag(scales) @ torch.linalg.qr(torch.randn(n, n, device=DEVICE)).Q
