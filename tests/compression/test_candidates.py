"""The cuts that are tried for a budget, and how the one that is taken compares with them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressing import batches, perceptron
from torch import Tensor, nn

import dynrank_fx as dr
from dynrank_fx.compression import Candidates
from dynrank_fx.compression.candidates import Candidate
from dynrank_fx.compression.recover import distance
from dynrank_fx.plan import Cost

SITES = ("0.weight", "2.weight", "4.weight")


def candidates(**settings: Any) -> Candidates:
    net = dr.transform(perceptron(), batches()[0], rank=dr.Ratio(0.25), allow_unprofitable=True).eval()
    return Candidates(net, dr.inline(net), batches(), dr.calibrate(net, batches()), **settings)


def far(module: nn.Module, dense: nn.Module) -> float:
    """The mean over the batches of Σ ‖z − y‖² / ‖y − ȳ‖²."""
    with torch.no_grad():
        pairs = [(module(*b), dense(*b)) for b in batches()]
        return sum(float((z - y).square().sum() / (y - y.mean(0)).square().sum()) for z, y in pairs) / len(pairs)


def test_the_distance_counts_every_output_of_numbers() -> None:
    y, z = torch.randn(5, 3), torch.randn(5, 3)
    each = float((z - y).square().sum() / (y - y.mean(0)).square().sum())
    assert float(distance(z, y)) == pytest.approx(each)
    assert float(distance({"a": z, "b": torch.arange(5)}, {"a": y, "b": torch.arange(5)})) == pytest.approx(each)
    assert float(distance((z, y), (y, y))) == pytest.approx(each)


def test_a_sensitivity_is_what_the_outputs_lose_with_that_site_alone_cut() -> None:
    """Over the share of its own outputs that the cut takes away, which is measured here by a hook."""
    tried = candidates()
    found = tried.sensitivities({"2.weight": 5})
    assert tuple(found) == SITES
    cut = tried.cut(dict.fromkeys(SITES) | {"2.weight": 5}).module
    inside: list[Tensor] = []
    with torch.no_grad():
        hidden = [nn.Sequential(*perceptron()[:2])(*b) for b in batches()]
        wanted = torch.cat([perceptron()[2](h) for h in hidden])
        with cut.get_submodule("3").register_forward_pre_hook(lambda module, args: inside.append(args[0])):
            moved = far(cut, perceptron())
    lost = float((torch.cat(inside) - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum())
    assert found["2.weight"] == pytest.approx(moved / lost, rel=0.05)  # which it measures on fewer examples


def test_of_the_cuts_that_are_tried_the_nearest_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Candidate] = []
    cut = Candidates.cut

    def watched(self: Candidates, ranks: Any) -> Candidate:
        tried.append(cut(self, ranks))
        return tried[-1]

    monkeypatch.setattr(Candidates, "cut", watched)
    best = candidates().best(dr.Budget(params=0.4))
    assert len(tried) > 1
    assert any(best is each for each in tried)
    assert far(best.module, perceptron()) == pytest.approx(min(far(each.module, perceptron()) for each in tried))
    ranks = [tuple(each.rank for each in found.cuts) for found in tried]
    assert len(set(ranks)) == len(ranks), "none is made twice"


def test_a_policy_of_ranks_is_followed_and_no_more() -> None:
    found = candidates(multiple_of=4).best(dr.Fixed(5))
    assert {cut.site: cut.rank for cut in found.cuts} == dict.fromkeys(SITES, 8)


def test_sites_that_are_not_faster_by_the_margin_stay_dense() -> None:
    """As a test says: the second takes as long as dense, the third 0.8 of it."""
    ratios = {"0.weight": 0.5, "2.weight": 1.0, "4.weight": 0.8}

    def latency(rows: Any) -> Cost:
        return Cost(0.2, lambda rank: 0.2 * ratios[rows[0].site.name])

    tried = candidates(latency=latency)
    for margin, dense in ((0.0, {"2.weight"}), (0.3, {"2.weight", "4.weight"}), (1.0, set(SITES))):
        ranks = tried.ranks(dr.Fixed(4), margin, {})
        assert {name for name, rank in ranks.items() if rank is None} == dense, margin
