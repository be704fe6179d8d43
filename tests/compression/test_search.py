"""What is searched for: the least model within a fall, within a time, and never slower than the dense one."""

from __future__ import annotations

from typing import Any

import pytest
from compressing import SaidTimes, batches, error, params, perceptron
from torch import nn

import dynrank_fx as dr
from dynrank_fx.compression import MaxDrop, compress
from dynrank_fx.compression.model_times import ModelTimes
from dynrank_fx.errors import PlanError
from dynrank_fx.plan import Cost
from dynrank_fx.timing import Pair


def test_the_least_model_within_a_drop() -> None:
    dense = perceptron()

    def metric(net: nn.Module) -> float:
        return -error(net, dense)

    found = compress(dense, batches()[0], MaxDrop(50.0), batches(), metric=metric)
    assert found.metrics is not None
    assert found.metrics[1] >= found.metrics[0] - 50
    less = compress(dense, batches()[0], dr.Budget(params=found.params[1] / params(dense) - 0.03), batches())
    assert metric(less.module) < -50
    with pytest.raises(PlanError, match="takes a metric"):
        compress(dense, batches()[0], MaxDrop(0.1), batches())


def test_a_site_that_is_not_faster_stays_dense() -> None:
    times = SaidTimes({"2.weight": 1.2})
    found = compress(perceptron(), batches()[0], dr.Budget(flops=0.6), batches(), times=times)
    assert [cut.site for cut in found.cuts if cut.rank is None] == ["2.weight"]
    assert isinstance(found.module.get_submodule("2"), nn.Module)
    assert params(found.module) < params(perceptron())


def test_a_budget_of_parameters_asks_for_size_alone_and_says_what_it_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModelTimes, "pair", lambda self, small: Pair(1.0, 1.3, 1.3))
    found = compress(perceptron(), batches()[0], dr.Budget(params=0.5), batches(), times=SaidTimes({"2.weight": 1.2}))
    assert all(cut.rank is not None for cut in found.cuts)
    assert any("slower than the dense model (1.30 of its time)" in note for note in found.notes)


def test_what_is_not_faster_as_a_whole_gives_way_site_by_site(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every site is faster by itself, but not the model: those least faster go back, and at worst all of them."""
    seen: list[int] = []

    def compared(self: Any, small: nn.Module) -> Pair:
        seen.append(params(small))
        ratio = 1.2 if params(small) < 0.8 * params(perceptron()) else 0.9
        return Pair(1.0, ratio, ratio)

    monkeypatch.setattr(ModelTimes, "pair", compared)
    times = SaidTimes({"0.weight": 0.95, "2.weight": 0.95, "4.weight": 0.5})
    found = compress(perceptron(), batches()[0], dr.Budget(latency=0.95), batches(), times=times)
    assert found.times is not None
    assert found.times.ratio == 0.9
    monkeypatch.setattr(ModelTimes, "pair", lambda self, small: Pair(1.0, 1.2, 1.2))
    found = compress(perceptron(), batches()[0], dr.Ratio(0.25), batches(), times=times)
    assert all(cut.rank is None for cut in found.cuts)
    assert params(found.module) == params(perceptron())


class ByRank(SaidTimes):
    """Times as the parameters are."""

    def cost(self, rows: Any, total: float) -> Cost:
        share = rows[0].site.params / params(perceptron())
        return Cost(share, lambda rank: share * rank / 64)


def test_a_budget_of_latency_is_met_by_the_times_of_the_sites(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModelTimes, "pair", lambda self, small: Pair(1.0, 0.5, 0.5))
    times = ByRank({})
    found = compress(perceptron(), batches()[0], dr.Budget(latency=0.7), batches(), times=times)
    costs = [times.cost([row], 1.0) for row in dr.plan_of(dr.transform(perceptron(), batches()[0])).sites]
    cuts = zip(costs, found.cuts, strict=True)
    taken = sum(cost.dense if cut.rank is None else cost.at(cut.rank) for cost, cut in cuts)
    assert 0.6 < taken + 1 - sum(cost.dense for cost in costs) <= 0.7 + 1e-9


def test_a_whole_that_takes_longer_than_its_layers_say_is_cut_further(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the whole takes a tenth more of the dense time than its parameters would say."""

    def pair(self: ModelTimes, small: nn.Module) -> Pair:
        ratio = 0.1 + params(small) / params(perceptron())
        return Pair(1.0, ratio, ratio)

    monkeypatch.setattr(ModelTimes, "pair", pair)
    found = compress(perceptron(), batches()[0], dr.Budget(latency=0.8), batches(), times=ByRank({}))
    assert found.times is not None
    assert found.times.ratio <= 0.82
    assert not any("Asked for" in note for note in found.notes)


def test_a_share_of_time_that_is_not_reached_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModelTimes, "pair", lambda self, small: Pair(1.0, 0.95, 0.95))
    found = compress(perceptron(), batches()[0], dr.Budget(latency=0.8), batches(), times=SaidTimes({}))
    assert any("Asked for 0.8 of the dense model's time; the least that was reached is 0.95" in n for n in found.notes)


def test_a_budget_that_only_slow_layers_could_meet_says_so() -> None:
    times = SaidTimes({"0.weight": 1.2, "2.weight": 1.2, "4.weight": 1.2})
    with pytest.raises(
        PlanError, match=r"cannot be met.*Only layers that are faster than dense count here.*`--no-timing`"
    ):
        compress(perceptron(), batches()[0], dr.Budget(flops=0.5), batches(), times=times)
