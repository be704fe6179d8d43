"""Singular values and the ranks read off them, against torch.linalg and spectra that are known."""

from __future__ import annotations

import math

import pytest
import torch
from known_spectra import SHAPES, SPECTRA, by_x, matrix

from dynrank_fx.layouts import effective_rank, energy_rank, product_singular_values, singular_values, stable_rank


@pytest.mark.parametrize("shape", SHAPES, ids=by_x)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_singular_values_are_those_of_each_group(spectrum, shape):
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
    B, A = torch.randn(g, m, r), torch.randn(g, r, n)
    formed = torch.linalg.svdvals(B.double() @ A.double())
    got = product_singular_values(B, A)
    k = min(m, n, r)
    assert got.shape == (g, k)
    torch.testing.assert_close(got, formed[:, :k], rtol=1e-12, atol=1e-12)


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


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_effective_rank_is_between_one_and_the_rank_and_stable_rank_below_it(spectrum):
    W = matrix(spectrum, (1, 12, 9))
    s, rank = singular_values(W), int(torch.linalg.matrix_rank(W)[0])
    assert min(rank, 1) - 1e-9 <= stable_rank(s) <= rank + 1e-9
    assert min(rank, 1) - 1e-9 <= effective_rank(s) <= min(W.shape[1:]) + 1e-9


def test_stable_rank_is_the_ratio_of_the_two_norms_of_the_weight():
    W = torch.randn(1, 7, 5, dtype=torch.float64)
    ratio = torch.linalg.matrix_norm(W) ** 2 / torch.linalg.matrix_norm(W, 2) ** 2
    assert stable_rank(singular_values(W)) == pytest.approx(float(ratio))


def test_singular_values_of_several_groups_count_together():
    s = torch.ones(3, 4, dtype=torch.float64)
    assert effective_rank(s) == pytest.approx(12)
    assert stable_rank(s) == pytest.approx(12)


@pytest.mark.parametrize("shape", [(1, 12, 9), (3, 5, 8)], ids=by_x)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_cut_to_the_energy_rank_keeps_the_share_and_one_less_does_not(shape, share):
    W = torch.randn(shape, dtype=torch.float64)
    s = singular_values(W)
    rank = energy_rank(s, share)
    kept = (s.square()[:, :rank].sum(-1) / torch.linalg.matrix_norm(W).square()).min()
    assert kept >= share - 1e-12
    if rank > 1:
        assert (s.square()[:, : rank - 1].sum(-1) / torch.linalg.matrix_norm(W).square()).min() < share


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_short_types_are_measured_in_float64_and_carry_no_gradient(dtype):
    W = torch.randn(2, 6, 4).to(dtype).requires_grad_()
    s = singular_values(W)
    assert not s.requires_grad
    torch.testing.assert_close(s, torch.linalg.svdvals(W.detach().double()))
    B, A = torch.randn(2, 6, 3).to(dtype).requires_grad_(), torch.randn(2, 3, 4).to(dtype)
    s = product_singular_values(B, A)
    assert s.dtype == torch.float64
    assert not s.requires_grad
