"""What outputs hold, against the outputs themselves: singular values of Y [m, N] in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dynrank_fx as dr
from dynrank_fx.compression import covariance
from dynrank_fx.compression.covariance import Bases, Covariance, output_basis, output_energies, projected


def data(m: int, n: int, count: int = 300, groups: int = 2) -> tuple[Tensor, Tensor]:
    """W [g, m, n] and inputs X [g, n, N] of falling energy."""
    generator = torch.Generator().manual_seed(m * n)
    W = torch.randn(groups, m, n, generator=generator, dtype=torch.float64)
    X = torch.randn(groups, n, count, generator=generator, dtype=torch.float64) * torch.linspace(2, 0.1, n)[:, None]
    return W, X


def of_inputs(W: Tensor, X: Tensor) -> Tensor:
    return X @ X.mT


def of_outputs(W: Tensor, X: Tensor) -> Tensor:
    return (W @ X) @ (W @ X).mT


@pytest.mark.parametrize("seen", [of_inputs, of_outputs])
@pytest.mark.parametrize(("m", "n"), [(7, 5), (5, 7)])
def test_the_basis_is_that_of_the_outputs(seen: Callable[[Tensor, Tensor], Tensor], m: int, n: int) -> None:
    W, X = data(m, n)
    V, roots = output_basis(W, seen(W, X), 0.0, of_inputs=seen is of_inputs)
    S = torch.linalg.svdvals(W @ X)
    k = min(m, n)
    torch.testing.assert_close(roots[..., :k], S[..., :k])
    eye = torch.eye(V.shape[-1], dtype=torch.float64).expand(2, -1, -1)
    torch.testing.assert_close(V.mT @ V, eye)
    for rank in range(1, k):  # Eckart and Young: nothing of this rank keeps the outputs better
        kept = V[..., :rank] @ (V[..., :rank].mT @ W @ X)
        lost = torch.linalg.matrix_norm(W @ X - kept)
        torch.testing.assert_close(lost, S[..., rank:].square().sum(-1).sqrt())


@pytest.mark.parametrize(("m", "n"), [(9, 6), (6, 9)])
def test_large_matrices_take_another_way_to_the_same_basis(m: int, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    W, X = data(m, n)
    direct = output_basis(W, of_inputs(W, X), 0.0, of_inputs=True)
    monkeypatch.setattr(covariance, "_DIRECT", 3)
    V, roots = output_basis(W, of_inputs(W, X), 0.0, of_inputs=True)
    torch.testing.assert_close(roots, direct[1])
    torch.testing.assert_close((V.mT @ direct[0]).abs(), torch.eye(min(m, n)).double().expand(2, -1, -1))  # up to signs


@pytest.mark.parametrize("inputs", [True, False])
def test_with_all_of_the_weight_added_the_basis_is_that_of_the_weight(inputs: bool) -> None:
    W, X = data(6, 6)
    seen = of_inputs(W, X) if inputs else of_outputs(W, X)
    V, _ = output_basis(W, seen, 1e9, of_inputs=inputs)
    U = torch.linalg.svd(W).U
    torch.testing.assert_close((V.mT @ U).abs(), torch.eye(6).double().expand(2, -1, -1), rtol=1e-4, atol=1e-4)


def test_factors_are_the_projection_and_are_balanced() -> None:
    W, _ = data(7, 5)
    V = torch.linalg.qr(torch.randn(2, 7, 3, dtype=torch.float64)).Q
    left, right = projected(W, V)
    torch.testing.assert_close(left @ right, V @ V.mT @ W)
    torch.testing.assert_close(left.norm(dim=-2), right.norm(dim=-1))
    zero, nothing = projected(torch.zeros_like(W), V)
    assert torch.equal(zero @ nothing, torch.zeros_like(W))
    assert bool(torch.isfinite(zero).all())


@pytest.mark.parametrize("m", [5, 20])
def test_what_is_collected_is_the_covariance_about_the_mean_that_a_bias_takes_up(m: int) -> None:
    """Against torch.cov, of the outputs where there are few, of the inputs where those are fewer."""
    torch.manual_seed(0)
    model, x = nn.Linear(12, m).double(), torch.randn(40, 12).double() + 3
    net = dr.transform(model, (x,), rank=dr.Fixed(2), allow_unprofitable=True)
    seen = dr.calibrate(net, [(x[:7],), (x[7:],)]).covariances["weight"]
    rows = x if m > 12 else x @ model.weight.detach().T
    assert (seen.count, seen.of_inputs) == (40, m > 12)
    torch.testing.assert_close(seen.matrix[0], torch.cov(rows.T, correction=0))


def test_a_spectrum_says_what_a_cut_of_each_rank_loses() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(12, 8), torch.randn(50, 12)
    net = dr.transform(model, (x,), rank=dr.Fixed(3), allow_unprofitable=True)
    known = dr.calibrate(net, [(x,)], shrink=0.0)
    values = known.spectrum("weight", model.weight)
    assert values is not None
    assert known.spectrum("another", model.weight) is None
    with torch.no_grad():
        lost = (dr.truncate(net, known)(x) - model(x)).square().sum() / len(x)
    assert float(values[0, 3:].square().sum()) == pytest.approx(float(lost), rel=1e-4)


def test_what_was_seen_too_rarely_is_named() -> None:
    net = dr.transform(nn.Linear(12, 8), (torch.randn(2, 12),), rank=dr.Fixed(2))
    assert dr.calibrate(net, [(torch.randn(7, 12),)]).scarce == ["weight"]
    assert dr.calibrate(net, [(torch.randn(8, 12),)]).scarce == []


def test_bases_are_found_once_for_a_weight_as_far_as_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """And anew for another weight, or another share of its own spectrum."""
    model, x = nn.Linear(12, 8), torch.randn(40, 12)
    net = dr.transform(model, (x,), rank=dr.Fixed(3))
    known = dr.calibrate(net, [(x,)])
    W, found = model.weight.detach(), []
    basis = Covariance.basis

    def counted(*given: Any) -> tuple[Tensor, Tensor]:
        found.append(given)
        return basis(*given)

    monkeypatch.setattr(Covariance, "basis", counted)
    for room, once in ((2**20, True), (0, False)):
        found.clear()
        kept = replace(known, bases=Bases(room))
        for weight in (W, W, 2 * W):
            arguments = ("weight",), dr.plan_of(net).sites[0].layout, weight, 3
            assert all(map(torch.equal, kept.split(*arguments) or (), known.split(*arguments) or ()))
        assert len(found) == (5 if once else 6)


@pytest.mark.parametrize(("m", "n"), [(12, 30), (30, 12)])
@pytest.mark.parametrize("direct", [True, False], ids=["small", "large"])
def test_energies_are_those_of_the_basis(monkeypatch: pytest.MonkeyPatch, m: int, n: int, direct: bool) -> None:
    """The singular values of the outputs themselves."""
    monkeypatch.setattr(covariance, "_DIRECT", 512 if direct else 4)
    W, X = data(m, n)
    for moment, inputs in ((of_inputs, True), (of_outputs, False)):
        found = output_energies(W, moment(W, X), of_inputs=inputs)
        for each, Y in zip(found, W @ X, strict=True):
            wanted = torch.linalg.svdvals(Y)[: min(m, n)]
            torch.testing.assert_close(each[: len(wanted)], wanted, rtol=1e-6, atol=1e-6 * float(wanted[0]))
