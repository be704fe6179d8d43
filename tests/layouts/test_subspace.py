"""A basis that is followed to where a weight has moved: good enough by proof, against torch.linalg in float64."""

from __future__ import annotations

import pytest
import torch
from known_spectra import SPECTRA, assert_balanced, matrix, orthonormal
from torch import Tensor

from dynrank_fx.layouts import subspace, svd

SHAPES = ((1, 160, 140), (1, 140, 190), (2, 150, 135))
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
RANK = 35


def norm(W: Tensor) -> float:
    return float(torch.linalg.vector_norm(W.double()))


def assert_best(W: Tensor, start: Tensor, rank: int = RANK) -> None:
    B, A = svd.truncate(W, rank, start)
    assert B.dtype == A.dtype == W.dtype
    for w, b, a in zip(W.double(), B.double(), A.double(), strict=True):
        least = norm(torch.linalg.svdvals(w)[rank:])
        assert norm(b @ a - w) <= 1.001 * least + 16 * torch.finfo(W.dtype).eps * norm(w)
    assert_balanced(B, A, W)


def right(W: Tensor, columns: slice) -> Tensor:
    """Singular vectors of the shorter side."""
    X = W.double() if W.shape[-2] >= W.shape[-1] else W.double().mT
    return torch.linalg.svd(X, full_matrices=False).Vh[..., columns, :].mT


@pytest.fixture
def proven(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each basis that was followed was found good enough."""
    seen = []
    real = subspace.warm_basis

    def watched(*arguments: object) -> object:
        found = real(*arguments)  # type: ignore[arg-type]
        seen.append(found is not None)
        return found

    monkeypatch.setattr(svd, "warm_basis", watched)
    return seen


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_from_any_start_the_cut_is_within_the_bound(dtype, spectrum):
    """Near, moved away, at random, of more columns, of zeros, and of the very directions that are to be cut away."""
    torch.manual_seed(0)
    W = matrix(spectrum, SHAPES[DTYPES.index(dtype)]).to(dtype)
    top = right(W, slice(RANK))
    starts = [
        top,
        top + 0.02 * torch.randn_like(top),
        top + 0.3 * torch.randn_like(top),
        torch.randn_like(top),
        torch.randn(*top.shape[:2], RANK + 9, dtype=top.dtype),
        torch.zeros_like(top),
        right(W, slice(-RANK, None)),
    ]
    for start in starts:
        assert_best(W, start.to(torch.bfloat16))


@pytest.mark.parametrize("drift", [0.0, 0.01, 0.05, 0.2])
@pytest.mark.parametrize("shape", [(1, 300, 200), (2, 150, 220)], ids=str)
def test_a_weight_that_has_trained_on_is_followed_and_not_cut_anew(shape, drift, proven):
    """Factors and what full-rank steps have added, whose own spectrum falls slowly."""
    torch.manual_seed(0)
    g, m, n = shape
    rank, k = 40, min(m, n)
    B, A = torch.randn(g, m, rank) / m**0.5, torch.randn(g, rank, n) / n**0.5
    steps = orthonormal(g, m, k) * torch.logspace(0, -1.5, k, dtype=torch.float64) @ orthonormal(g, n, k).mT
    W = (B @ A).double() + drift * norm(B @ A) / norm(steps) * steps
    for dtype in (torch.float32, torch.float64):
        assert_best(W.to(dtype), (A.mT if m >= n else B).bfloat16(), rank)
    assert proven == [True, True]


def test_directions_that_came_up_unseen_are_not_missed(proven):
    """Half of the new top lies outside of the start, which power iteration from it alone would find late."""
    torch.manual_seed(0)
    U, V = orthonormal(1, 200, 200), orthonormal(1, 200, 200)
    s = torch.cat([torch.linspace(2, 1, 40), torch.full((160,), 0.1)]).double()
    W = ((U * s) @ V.mT).float()
    start = torch.cat([V[..., :20], V[..., 100:120]], dim=-1)
    assert_best(W, start, 40)


def test_a_start_of_another_shape_says_nothing(proven):
    torch.manual_seed(0)
    W = matrix("power law", (1, 160, 140)).float()
    for shape in ((1, 140, 10), (1, 160, 35), (2, 140, 35)):
        assert_best(W, torch.randn(shape))
    assert proven == []


def test_the_global_generator_is_not_touched_and_the_answer_is_the_same_every_time():
    torch.manual_seed(0)
    W = matrix("geometric", (1, 160, 140)).float()
    start = right(W, slice(RANK)) + 0.01 * torch.randn(1, 140, RANK)
    before = torch.get_rng_state()
    once, again = (svd.truncate(W, RANK, start) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
