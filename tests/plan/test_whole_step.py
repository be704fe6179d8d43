"""Shares of a step of the whole model: they add up to what the whole has saved, by the sites' own times."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from step_clock import Said, planned
from torch import nn

import dynrank_fx as dr
from dynrank_fx.plan import with_whole
from dynrank_fx.timing import Pair


def plan_with(times: list[tuple[float, float] | None]) -> dr.Plan:
    plan = planned(Said())
    return replace(plan, sites=tuple(replace(row, seconds=t) for row, t in zip(plan.sites, times, strict=True)))


def steps(plan: dr.Plan) -> list[tuple[float, float]]:
    return [row.step for row in plan.sites if row.step is not None]


@pytest.mark.parametrize("ratio", [0.4, 0.7, 0.95, 1.0])
@pytest.mark.parametrize("whole", [1.0, 10.0])
def test_what_sites_save_adds_up_to_what_the_whole_saves(ratio: float, whole: float) -> None:
    plan = with_whole(plan_with([(2.0, 1.0), (4.0, 1.0)]), Pair(whole, whole * ratio, ratio))
    saved = [dense - low for dense, low in steps(plan)]
    assert saved == pytest.approx([0.25 * (1 - ratio), 0.75 * (1 - ratio)])
    assert all(low >= 0 for _, low in steps(plan))
    assert plan.low_time == pytest.approx(ratio)
    assert plan.seconds == pytest.approx((whole, whole * ratio))


def test_where_the_whole_saves_what_its_sites_do_their_times_are_their_shares() -> None:
    plan = with_whole(plan_with([(2.0, 1.0), (4.0, 1.0)]), Pair(10.0, 6.0, 0.6))
    assert steps(plan) == [pytest.approx((0.2, 0.1)), pytest.approx((0.4, 0.1))]


def test_a_step_that_is_slower_in_low_saves_nothing() -> None:
    plan = with_whole(plan_with([(2.0, 1.0), (4.0, 1.0)]), Pair(10.0, 12.0, 1.2))
    assert (plan.low_time, plan.seconds) == (1.0, (10.0, 12.0))


def test_a_site_that_was_not_timed_runs_at_the_speed_of_the_others() -> None:
    plan = with_whole(plan_with([(2.0, 1.0), None]), Pair(10.0, 5.0, 0.5))
    first, second = plan.sites
    saved = [1.0, 2.0 * (1 - (second.flops or 0) / (second.site.flops or 1))]
    assert [d - low for d, low in steps(plan)] == pytest.approx([0.5 * each / sum(saved) for each in saved])
    assert first.site.flops == second.site.flops


def test_the_shares_are_in_the_plan_its_file_and_its_table_and_follow_a_rank_by_flops() -> None:
    plan = planned(Said(whole=Pair(8e-3, 7.2e-3, 0.9)))
    assert plan.low_time == pytest.approx(0.9)
    assert "whole step  8 -> 7.2 ms of the model (90.0% of dense), in turn" in str(plan).splitlines()
    again = dr.Plan.from_json(plan.to_json())
    assert (steps(again), again.seconds, again.low_time) == (steps(plan), plan.seconds, plan.low_time)
    other = plan.with_ranks({"0.weight": 15})
    (dense, low), (dense_after, low_after) = steps(plan)[0], steps(other)[0]
    assert (dense_after, low_after) == (dense, pytest.approx(low / 2)), "half of the rank"
    assert steps(other)[1] == steps(plan)[1]
    assert planned(Said()).low_time is None


def test_a_model_whose_step_is_slower_in_low_is_said_to_be_so() -> None:
    said = "whole step  1 -> 1.2 ms of the model (120.0% of dense), in turn; nothing is gained: train dense"
    assert said in str(planned(Said(whole=Pair(1e-3, 1.2e-3, 1.2)))).splitlines()


def test_what_is_timed_is_the_net_in_full_and_in_low() -> None:
    """The parameters of both, and gradients of all; neither the net nor a random number is another for it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 40), nn.Dropout(0.5), nn.BatchNorm1d(40), nn.Linear(40, 40, bias=False))
    seen: list[tuple[list[int], bool]] = []

    class Watched(dr.StepTimes):
        def _measured(self, rows: Any) -> Pair:
            return Pair(1.0, 0.5, 0.5)

        def _whole_step(self, net: nn.Module, inputs: Any) -> Any:
            step = super()._whole_step(net, inputs)
            assert step is not None
            gradients: Any = step()
            seen.append(([each.numel() for each in gradients], net.training))
            return step

    net = dr.transform(model, (torch.randn(8, 40),), rank=dr.Fixed(4), times=Watched(cache=None, repeats=1), leave=())
    dense, factors, rest = [1600] * 2, [160] * 4, [40] * 3
    assert [(sorted(sizes), mode) for sizes, mode in seen] == [([*rest, *dense], True), ([*rest, *factors], True)]
    plan = dr.plan_of(net)
    assert min(plan.seconds or (0.0,)) > 0
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, net.state_dict()[name]), name
    drawn = torch.rand(3)
    torch.manual_seed(0)
    nn.Sequential(nn.Linear(40, 40), nn.Dropout(0.5), nn.BatchNorm1d(40), nn.Linear(40, 40, bias=False))
    torch.randn(8, 40)
    assert torch.equal(drawn, torch.rand(3))


def test_a_model_that_cannot_be_timed_so_is_refused_in_a_sentence() -> None:
    with pytest.raises(dr.PlanError, match=r"a training step of the whole model cannot be timed on .*: give StepTimes"):
        planned(_Failing())


class _Failing(Said):
    def _measured_whole(self, net: Any, low: Any, inputs: Any) -> Pair | None:
        return dr.StepTimes._measured_whole(self, net, low, (torch.zeros(4, 3),))
