"""Matrices of known singular values, which the tests of the algebra share."""

from __future__ import annotations

import torch
from torch import Tensor

# groups, rows, columns; the ones over 128 columns take the eigenvectors of the Gram matrix
SHAPES = ((1, 12, 9), (1, 10, 10), (3, 5, 8), (1, 1, 7), (1, 7, 1), (1, 160, 140), (2, 135, 150))
SPECTRA = {
    "flat": lambda i: torch.ones_like(i),
    "power law": lambda i: (i + 1) ** -1.5,
    "geometric": lambda i: 0.7**i,
    "steep": lambda i: 0.1**i,
    "one huge": lambda i: torch.where(i == 0, 1e6, 0.95**i),
    "rank deficient": lambda i: (i < max(1, len(i) // 4)).to(i),
    "one dominant": lambda i: torch.where(i == 0, 1.0, 1.5e-3 * 0.99**i),
    "zeros": lambda i: torch.zeros_like(i),
}


def by_x(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def orthonormal(g: int, rows: int, columns: int) -> Tensor:
    return torch.linalg.qr(torch.randn(g, rows, columns, dtype=torch.float64)).Q


def matrix(spectrum: str, shape: tuple[int, int, int], scale: float = 1.0) -> Tensor:
    """Float64 [g, m, n] with these singular values in random bases."""
    g, m, n = shape
    k = min(m, n)
    s = scale * SPECTRA[spectrum](torch.arange(k, dtype=torch.float64))
    return orthonormal(g, m, k) * s @ orthonormal(g, n, k).mT


def assert_balanced(B: Tensor, A: Tensor, W: Tensor) -> None:
    """BᵀB = A Aᵀ among the directions above rounding, whose own entries are sound to ε σ_1² / √(σ_i σ_j)."""
    s = torch.linalg.svdvals(W.double())[:, : B.shape[-1]]
    largest, eps = s[:, :1], torch.finfo(W.dtype).eps
    strong = s > 100 * eps * largest
    root = torch.where(strong, s, torch.inf).sqrt()
    difference = B.double().mT @ B.double() - A.double() @ A.double().mT
    scaled = difference * root[:, :, None] * root[:, None, :] / largest.square()[:, :, None]
    assert bool((scaled[strong[:, :, None] & strong[:, None, :]].abs() <= 50 * eps).all())
