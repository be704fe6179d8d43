"""The best factors of a matrix, against float64 and torch.linalg."""

from __future__ import annotations

import pytest
import torch
from known_spectra import SHAPES, SPECTRA, assert_balanced, by_x, matrix, orthonormal
from torch import Tensor

from dynrank_fx.layouts import svd

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def norm(W: Tensor) -> float:
    return float(torch.linalg.vector_norm(W.double()))


def ranks(shape: tuple[int, int, int]) -> list[int]:
    limit = min(shape[1:])
    return sorted({1, max(1, limit // 3), limit})


def assert_best(W: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Within 1.001 of Eckart–Young in float64, or rounding in W's own dtype; returns the factors, both finite."""
    B, A = svd.truncate(W, rank)
    assert B.dtype == A.dtype == W.dtype
    assert (B.shape, A.shape) == ((*W.shape[:2], rank), (W.shape[0], rank, W.shape[2]))
    assert bool(torch.isfinite(B).all() and torch.isfinite(A).all())
    least = norm(torch.linalg.svdvals(W.double())[:, rank:])
    error = norm(B.double() @ A.double() - W.double())
    assert error <= 1.001 * least + 16 * torch.finfo(W.dtype).eps * norm(W)
    return B, A


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", SHAPES, ids=by_x)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_truncation_is_within_1_001_of_the_best_balanced_and_nowhere_dead(dtype, shape, spectrum):
    torch.manual_seed(0)
    scale = 1e-3 if spectrum == "one huge" and dtype is torch.float16 else 1.0
    W = matrix(spectrum, shape, scale).to(dtype)
    for rank in ranks(shape):
        B, A = assert_best(W, rank)
        assert_balanced(B, A, W)
        # A pair of zeros would have zero gradients for ever.
        alive = torch.linalg.vector_norm(B.double(), dim=-2) + torch.linalg.vector_norm(A.double(), dim=-1)
        assert bool((alive > 0).all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e15, 1e30])
@pytest.mark.parametrize("shape", [(1, 12, 9), (2, 135, 150)], ids=by_x)
def test_tiny_and_huge_weights_are_cut_as_well_as_others(shape, scale, dtype):
    """Their squares, 1e-60 and 1e60, have no float32."""
    torch.manual_seed(0)
    for spectrum in ("flat", "power law", "geometric"):
        W = matrix(spectrum, shape, scale).to(dtype)
        for rank in ranks(shape):
            B, A = assert_best(W, rank)
            assert_balanced(B, A, W)


@pytest.mark.parametrize("decay", [0.999, 0.99])
@pytest.mark.parametrize("tail", [1.5e-4, 1e-3, 1e-2, 1e-1])
def test_a_dominant_direction_does_not_blur_the_small_ones(tail, decay):
    """Rounding in a float32 Gram matrix is relative to the largest eigenvalue: at a small tail it would cost 1 %."""
    torch.manual_seed(0)
    n, rank = 300, 100
    s = decay ** torch.arange(n, dtype=torch.float64)
    s = s * (tail / s[rank:].square().sum()).sqrt()
    s[0] = 1.0
    W = (orthonormal(1, n, n) * s @ orthonormal(1, n, n).mT).float()
    B, A = svd.truncate(W, rank)
    least = norm(torch.linalg.svdvals(W.double())[:, rank:])
    assert norm(B.double() @ A.double() - W.double()) <= 1.001 * least


@pytest.mark.parametrize("n", [9, 150])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_zero_group_among_others_gives_zero_and_can_train_on(dtype, n):
    torch.manual_seed(0)
    W = torch.randn(3, 160, n, dtype=torch.float64).to(dtype)
    W[1] = 0
    B, A = svd.truncate(W, 4)
    assert not bool(B[1].any())
    gram = A[1].double() @ A[1].double().mT
    torch.testing.assert_close(gram, torch.eye(4, dtype=torch.float64), rtol=0, atol=4 * torch.finfo(dtype).eps)
    assert norm(B[0]) > 0
    for group in (0, 2):
        assert_best(W[group : group + 1], 4)


def test_truncation_ignores_and_restores_the_process_wide_precision(monkeypatch):
    cuda, mkldnn = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = cuda.fp32_precision, mkldnn.fp32_precision
    seen = []
    real = svd.right_basis

    def watched(W: Tensor, rank: int) -> Tensor:
        seen.append((cuda.fp32_precision, mkldnn.fp32_precision))
        if rank == 3:
            raise KeyboardInterrupt
        return real(W, rank)

    monkeypatch.setattr(svd, "right_basis", watched)
    try:
        cuda.fp32_precision, mkldnn.fp32_precision = "tf32", "bf16"
        svd.truncate(torch.randn(1, 8, 6), 2)
        assert (cuda.fp32_precision, mkldnn.fp32_precision) == ("tf32", "bf16")
        with pytest.raises(KeyboardInterrupt):
            svd.truncate(torch.randn(1, 8, 6), 3)
        assert (cuda.fp32_precision, mkldnn.fp32_precision) == ("tf32", "bf16")
    finally:
        cuda.fp32_precision, mkldnn.fp32_precision = before
    assert seen == [("ieee", "ieee")] * 2


def test_an_eigensolver_that_fails_gives_way_to_the_svd(monkeypatch):
    torch.manual_seed(0)
    W = matrix("power law", (1, 200, 150)).float()

    def fails(*args: object) -> None:
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    assert_best(W, 40)
    monkeypatch.setattr(torch.linalg, "eigh", lambda G: (G[..., 0], torch.full_like(G, torch.nan)))
    assert_best(W, 40)
