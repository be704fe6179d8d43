"""The mathematics of factors, against float64, torch.linalg and autograd."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dynrank_fx.layouts import effective_rank, energy_rank, product_singular_values, singular_values, stable_rank, svd
from dynrank_fx.layouts.moments import moments_to_dense, second_moments_to_dense

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
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


def assert_balanced(B: Tensor, A: Tensor, W: Tensor) -> None:
    """BᵀB = A Aᵀ among the directions above rounding, whose own entries are sound to ε σ_1² / √(σ_i σ_j)."""
    s = torch.linalg.svdvals(W.double())[:, : B.shape[-1]]
    largest, eps = s[:, :1], torch.finfo(W.dtype).eps
    strong = s > 100 * eps * largest
    root = torch.where(strong, s, torch.inf).sqrt()
    difference = B.double().mT @ B.double() - A.double() @ A.double().mT
    scaled = difference * root[:, :, None] * root[:, None, :] / largest.square()[:, :, None]
    assert bool((scaled[strong[:, :, None] & strong[:, None, :]].abs() <= 50 * eps).all())


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


# Spectra


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_singular_values_are_those_of_each_group(spectrum, shape):
    torch.manual_seed(0)
    W = matrix(spectrum, shape)
    expected = SPECTRA[spectrum](torch.arange(min(shape[1:]), dtype=torch.float64)).sort(descending=True).values
    got = singular_values(W.float())
    assert got.shape == (shape[0], min(shape[1:]))
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, expected.expand_as(got), rtol=0, atol=2e-7 * float(expected.max()))


@pytest.mark.parametrize(
    ("g", "m", "n", "r"), [(1, 9, 7, 3), (3, 5, 8, 5), (2, 4, 6, 4), (1, 6, 6, 1), (1, 3, 8, 5), (2, 3, 4, 7)]
)
def test_the_spectrum_of_a_product_equals_that_of_the_formed_product(g, m, n, r):
    torch.manual_seed(0)
    B, A = torch.randn(g, m, r), torch.randn(g, r, n)
    formed = torch.linalg.svdvals(B.double() @ A.double())
    got = product_singular_values(B, A)
    k = min(m, n, r)
    torch.testing.assert_close(got[:, :k], formed[:, :k], rtol=1e-12, atol=1e-12)
    assert not bool((got[:, k:] > 1e-12).any())


@pytest.mark.parametrize(
    ("s", "effective", "stable"),
    [
        ([2.0, 2.0, 2.0, 2.0], 4.0, 4.0),
        ([3.0, 0.0, 0.0], 1.0, 1.0),
        ([0.0, 0.0], 0.0, 0.0),
        ([2.0, 1.0, 1.0], 2 * math.sqrt(2), 1.5),  # p = ½, ¼, ¼: entropy 1.5 ln 2
    ],
)
def test_effective_and_stable_rank_of_known_spectra(s, effective, stable):
    values = torch.tensor(s, dtype=torch.float64)
    assert effective_rank(values) == pytest.approx(effective)
    assert stable_rank(values) == pytest.approx(stable)
    for scale in (1e-12, 1e12):
        assert effective_rank(values * scale) == pytest.approx(effective), "neither depends on the scale"
        assert stable_rank(values * scale) == pytest.approx(stable)


@pytest.mark.parametrize(
    ("s", "share", "rank"),
    [
        ([[1.0, 1.0, 1.0, 1.0]], 0.5, 2),
        ([[1.0, 1.0, 1.0, 1.0]], 0.51, 3),
        ([[1.0, 1.0, 1.0, 1.0]], 1.0, 4),
        ([[3.0, 1.0, 0.0, 0.0]], 0.9, 1),
        ([[3.0, 1.0, 0.0, 0.0]], 0.91, 2),
        ([[3.0, 1.0, 0.0, 0.0]], 1.0, 2),
        ([[3.0, 1.0, 0.0], [1.0, 1.0, 1.0]], 0.9, 3),  # the group that needs most decides
        ([[0.0, 0.0, 0.0]], 0.9, 1),
    ],
)
def test_energy_rank_is_the_least_that_keeps_the_share_in_every_group(s, share, rank):
    values = torch.tensor(s, dtype=torch.float64)
    assert energy_rank(values, share) == rank


# Moments


def random_factors(g: int = 2, m: int = 6, n: int = 5, r: int = 3, dead: int = 0) -> tuple[Tensor, Tensor]:
    """Factors in float64, with the last ``dead`` directions of B missing, and the first ``dead`` of A."""
    B, A = torch.randn(g, m, r, dtype=torch.float64), torch.randn(g, r, n, dtype=torch.float64)
    if dead:
        mix = torch.randn(r, r, dtype=torch.float64)
        B = torch.cat([B[..., dead:], torch.zeros(g, m, dead, dtype=torch.float64)], -1) @ mix
        A = mix @ torch.cat([torch.zeros(g, dead, n, dtype=torch.float64), A[:, dead:]], 1)
    return B, A


@pytest.mark.parametrize(
    ("m", "n", "r", "dead"),
    [
        (m, n, r, dead)
        for m, n, r in ((6, 5, 3), (4, 7, 4), (5, 4, 1), (5, 5, 5), (3, 4, 6))
        for dead in range(min(r, 3))
    ],
)
def test_moments_of_the_weight_are_the_least_norm_least_squares_solution(m, n, r, dead):
    """min ‖M Aᵀ − M_B‖² + ‖Bᵀ M − M_A‖² over vec(M), by torch.linalg.lstsq."""
    torch.manual_seed(0)
    B, A = random_factors(1, m, n, r, dead)
    M_B, M_A = torch.randn_like(B), torch.randn_like(A)
    got = moments_to_dense(M_B, M_A, B, A)[0]
    eye_m, eye_n = torch.eye(m, dtype=torch.float64), torch.eye(n, dtype=torch.float64)
    # rows of vec: vec(M Aᵀ) = (I ⊗ A) vec(M) and vec(Bᵀ M) = (Bᵀ ⊗ I) vec(M)
    system = torch.cat([torch.kron(eye_m, A[0]), torch.kron(B[0].mT.contiguous(), eye_n)])
    target = torch.cat([M_B.flatten(), M_A.flatten()])
    expected = torch.linalg.lstsq(system, target[:, None], rcond=1e-12, driver="gelsd").solution.reshape(m, n)
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dead", [0, 1])
def test_consistent_moments_are_reproduced_exactly(dead):
    torch.manual_seed(0)
    B, A = random_factors(dead=dead)
    M = torch.randn(2, 6, 5, dtype=torch.float64)
    M_B, M_A = M @ A.mT, B.mT @ M
    again = moments_to_dense(M_B, M_A, B, A)
    torch.testing.assert_close(again @ A.mT, M_B, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(B.mT @ again, M_A, rtol=1e-10, atol=1e-10)


def test_moments_of_zero_factors_are_zero_and_finite():
    B, A = torch.zeros(1, 4, 2), torch.zeros(1, 2, 3)
    assert not bool(moments_to_dense(torch.ones_like(B), torch.ones_like(A), B, A).any())
    assert not bool(second_moments_to_dense(torch.ones_like(B), torch.ones_like(A), B, A).any())


def test_second_moments_to_dense_recover_a_rank_one_v_exactly():
    torch.manual_seed(0)
    B, A = random_factors()
    V = (torch.rand(2, 6, 1, dtype=torch.float64) + 0.1) * (torch.rand(2, 1, 5, dtype=torch.float64) + 0.1)
    V_B, V_A = V @ A.square().mT, B.square().mT @ V
    torch.testing.assert_close(second_moments_to_dense(V_B, V_A, B, A), V, rtol=1e-12, atol=0)


def test_second_moments_stay_nonnegative_and_finite():
    torch.manual_seed(0)
    B, A = random_factors(dead=1)
    V = torch.rand(2, 6, 5, dtype=torch.float64)
    back = second_moments_to_dense(V @ A.square().mT, B.square().mT @ V, B, A)
    assert bool(torch.isfinite(back).all())
    assert bool((back >= 0).all())
