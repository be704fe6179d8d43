"""Ranks by measured time, with a clock that the test sets."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from step_clock import Said, planned
from torch import nn

import dynrank_fx as dr


def ranks(plan: dr.Plan) -> list[int]:
    return [row.rank for row in plan.sites]


def test_where_all_ranks_are_as_fast_the_one_asked_for_stays() -> None:
    assert ranks(planned(Said())) == [30, 30]


def test_the_fastest_rank_nearby_is_taken_and_of_those_alike_the_nearest() -> None:
    assert ranks(planned(Said({24: 0.6, 30: 0.9, 32: 0.4}))) == [32, 32]
    assert ranks(planned(Said({24: 0.59, 30: 0.6, 32: 0.9}))) == [30, 30]


def test_a_lower_rank_has_to_gain_more_in_time_than_it_loses_in_rank() -> None:
    """Kernels of time proportional to the rank would else shrink every rank by a quarter."""
    in_proportion = {rank: 0.02 * rank for rank in range(16, 40)}
    assert ranks(planned(Said(in_proportion))) == [30, 30]
    plan = planned(Said(in_proportion | {24: 0.4}))
    assert ranks(plan) == [24, 24]
    assert [row.asked for row in plan.sites] == [30, 30]
    assert "  *24  " in str(plan)
    assert "ranks       2 sites have another than was asked for, with which a step is faster (*)" in str(plan)
    assert [row.asked for row in dr.Plan.from_json(plan.to_json()).sites] == [30, 30]


def test_a_higher_rank_keeps_no_more_than_was_asked_for() -> None:
    assert ranks(planned(Said({30: 0.5, 32: 0.51}))) == [30, 30]
    assert ranks(planned(Said({30: 0.6, 32: 0.5}))) == [32, 32]


def test_lower_ranks_are_tried_where_none_nearby_is_faster_than_dense() -> None:
    assert ranks(planned(Said({16: 0.8}, other=1.2))) == [16, 16]


def test_what_is_not_faster_stays_dense_and_says_so() -> None:
    plan = planned(Said(other=1.1))
    assert ranks(plan) == []
    assert [skipped.reason for skipped in plan.skipped] == [
        "measured: a training step takes 1.1 ms with factors of rank 30 and 1 ms dense; ranks from 16 to 32 are not "
        "faster either"
    ] * 2


def test_a_gain_within_the_noise_is_none() -> None:
    assert ranks(planned(Said(other=0.98))) == []


def test_other_ranks_are_multiples_of_what_is_asked_for() -> None:
    times = Said({24: 0.2}, other=0.9)
    assert ranks(planned(times, multiple_of=16)) == [32, 32]
    assert {row.rank % 16 for row in times.asked} == {0}


def test_no_rank_is_tried_that_costs_more_than_dense() -> None:
    times = Said(other=1.5)
    planned(times, rank=95)
    assert max(row.rank for row in times.asked) < 100


def test_the_plan_tells_the_times_in_its_table_and_its_file() -> None:
    plan = planned(Said({30: 0.25}))
    assert [row.seconds for row in plan.sites] == [(1e-3, 2.5e-4)] * 2
    lines = str(plan).splitlines()
    assert "ms a step" in lines[0]
    assert "1 -> 0.25" in lines[2]
    assert any(line.startswith("step        2 -> 0.5 ms in the sites, forward and backward (") for line in lines)
    data = json.loads(plan.to_json())
    assert data["sites"][0]["seconds"] == [1e-3, 2.5e-4]
    again = dr.Plan.from_json(plan.to_json())
    assert (again.timed, [row.seconds for row in again.sites]) == (plan.timed, [(1e-3, 2.5e-4)] * 2)
    assert plan.timed.endswith("float32, eager")
    other = plan.with_ranks({"0.weight": 8})
    assert [row.seconds for row in other.sites] == [None, (1e-3, 2.5e-4)]
    fitted = dr.transform(
        nn.Sequential(*(nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 200))),
        plan=plan,
        example_inputs=(torch.zeros(4, 200),),
    )
    assert str(dr.plan_of(fitted)).splitlines()[0] == lines[0]


@pytest.mark.parametrize("seconds", ["soon", [1], [1, "x"], [1, -1]])
def test_times_that_cannot_be_make_no_plan(seconds: Any) -> None:
    data = json.loads(planned(Said()).to_json())
    data["sites"][0]["seconds"] = seconds
    with pytest.raises(dr.PlanError, match="value of the wrong kind"):
        dr.Plan.from_json(json.dumps(data))


def test_sites_that_share_a_factor_are_timed_together() -> None:
    class QK(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(80, 60), nn.Linear(80, 60)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.q(x) * self.k(x)

    times = Said()
    net = dr.transform(QK(), (torch.zeros(2, 80),), rank=dr.Fixed(16), share_inputs=True, times=times, leave=())
    rows = dr.plan_of(net).sites
    assert [row.seconds for row in rows] == [(1e-3, 5e-4), None]
    assert [row.site.name for row in times.asked] == ["q.weight", "k.weight"]


def test_times_are_of_the_training_batch_and_flops_of_the_example() -> None:
    times = Said(inputs=(torch.zeros(64, 200),))
    plan = planned(times)
    assert {use.input_shape for row in times.asked for use in row.site.uses} == {(64, 200)}
    assert {use.input_shape for row in plan.sites for use in row.site.uses} == {(4, 200)}


def test_what_is_no_measure_is_refused() -> None:
    with pytest.raises(dr.PlanError, match="times is 3: give StepTimes"):
        dr.transform(nn.Linear(20, 30), (torch.zeros(2, 20),), times=3)  # type: ignore[arg-type]
