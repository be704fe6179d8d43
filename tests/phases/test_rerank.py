"""Ranks decided anew on the weights as they are."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from planning import Perceptron, steep
from torch import Tensor, nn

import dynrank_fx as dr
from dynrank_fx.phases import rank_units
from dynrank_fx.plan import Cost, Curve, Metric, PlannedSite


def test_ranks_follow_the_weights_by_the_steps_of_the_grid():
    net = dr.transform(Perceptron(), (torch.randn(3, 40),), rank=dr.Fixed(8), exclude=["head"])
    net.load_state_dict(steep().state_dict())
    plan = dr.reranked(net, dr.Energy(0.99), ladder=8)
    assert {row.site.name: row.rank for row in plan.sites} == {"a.weight": 5, "b.weight": 15}
    assert {row.rank for row in dr.plan_of(net).sites} == {8}, "nothing is changed"
    optimizer = torch.optim.AdamW(net.parameters())
    dr.replan_(net, plan, optimizer)
    dr.enter_(net, dr.Phase.LOW, optimizer)
    assert net.get_parameter("a.left").shape == (40, 5)
    down = dr.reranked(net, dr.Budget(params=0.45), ladder=8)
    assert down.low_params <= 0.45 * down.total_params
    assert all(new.rank <= old.rank for new, old in zip(down.sites, plan.sites, strict=True))


def test_sites_of_one_factor_get_one_rank():
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) * self.b(x)

    net = dr.transform(Pair(), (torch.randn(2, 32),), share_inputs=True, rank=dr.Fixed(4))
    plan = dr.reranked(net, dr.Ratio(0.5))
    assert [row.rank for row in plan.sites] == [16, 16]
    dr.enter_(net, dr.Phase.LOW)
    dr.replan_(net, dr.reranked(net, dr.Ratio(0.1)))
    assert net.get_parameter("a.left").shape == (32, 4)


def net_of(phase: dr.Phase = dr.Phase.FULL, how: dr.Capture = dr.Capture.SYMBOLIC) -> nn.Module:
    net = dr.transform(steep(), (torch.randn(3, 40),), rank=dr.Fixed(4), exclude=["head"], how=how)
    dr.enter_(net, phase)
    return net


@pytest.mark.parametrize("phase", list(dr.Phase))
def test_the_curves_are_of_the_weights_as_they_are_in_every_phase(phase):
    net = net_of(phase)
    for unit, name in zip(rank_units(net), ("a", "b"), strict=True):
        assert unit.names == (f"{name}.weight",)
        expected = torch.linalg.svdvals(net.get_submodule(name).weight.detach().double())
        torch.testing.assert_close(unit.curve.spectrum()[0].double(), expected, atol=1e-5, rtol=1e-5)


def test_a_site_gets_no_rank_at_which_it_would_cost_more_than_dense():
    class Everything:
        def ranks(self, curves: Sequence[Curve]) -> list[int]:
            return [curve.max_rank for curve in curves]

    net = net_of()
    for ladder in (16, 40):
        plan = dr.reranked(net, Everything(), ladder=ladder)
        for row in plan.sites:
            step = -(-40 // ladder)
            assert row.params < row.site.params <= row.params + step * 80
    with pytest.raises(dr.PlanError, match=r"^0\.5 is no rank policy: give"):
        dr.reranked(net, 0.5)


def test_ranks_are_rounded_up_to_a_step_of_the_ladder():
    for ladder in (4, 8):
        plan = dr.reranked(net_of(), dr.Fixed(3), ladder=ladder)
        assert {row.rank for row in plan.sites} == {40 // ladder}


def test_a_unit_says_whether_a_rank_pays_in_all_that_is_counted_or_in_some_of_it():
    (unit, _) = rank_units(net_of())
    assert [rank for rank in range(1, 41) if unit.pays(rank)] == list(range(1, 20)), "r (40 + 40) < 40 · 40"
    assert unit.pays(19, Metric.PARAMS)
    slow = rank_units(net_of(), latency=lambda rows: Cost(0.2, lambda rank: 0.3))[0]
    assert not slow.pays(1)
    assert slow.pays(1, Metric.PARAMS, Metric.FLOPS)
    assert rank_units(net_of(), latency=lambda rows: None)[0].pays(1), "what could not be timed counts nothing"


def test_a_margin_leaves_only_the_ranks_that_are_faster_by_more_than_it():
    def time(rows: Sequence[PlannedSite]) -> Cost:
        return Cost(0.2, lambda rank: 0.011 * rank)

    (unit, _) = rank_units(net_of(), latency=time, margin=0.25)
    assert unit.curve.grid == tuple(range(1, 14)), "0.011 r < 0.75 · 0.2"
    never = rank_units(net_of(), latency=time, margin=0.99)[0]
    assert never.curve.grid == (never.curve.max_rank,)
    assert rank_units(net_of(), latency=time)[0].curve.grid == ()


def test_what_is_known_beside_the_weights_goes_into_the_curves():
    net = net_of()
    total = dr.plan_of(net).total_params
    plain, told = (
        rank_units(net, **more)[0].curve
        for more in ({}, {"weights": {"a.weight": 3.0}, "extra": {"a.weight": 40}, "known": {"a.weight": 5}})
    )
    assert (plain.weight, plain.rank, told.weight, told.rank) == (1.0, 0, 3.0, 5)
    params = told.costs[Metric.PARAMS]
    assert params.at(3) - plain.costs[Metric.PARAMS].at(3) == pytest.approx(40 / total)
    assert params.dense == plain.costs[Metric.PARAMS].dense
    stands = rank_units(net, spectrum=lambda name, weight: torch.ones(1, 7) if name == "a.weight" else None)
    assert stands[0].curve.spectrum().tolist() == [[1.0] * 7 + [0.0] * 33], "filled up to the full rank"
    assert stands[1].curve.spectrum().shape == (1, 40)
