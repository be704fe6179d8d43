"""What a step costs: by FLOPs as torch counts them, by parameters, and by times that the test sets."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.optim import SGD

import dynrank_fx as dr
from dynrank_fx.training import cost_of

FULL, LOW, ADAPTOR = dr.Phase.FULL, dr.Phase.LOW, dr.Phase.ADAPTOR


def made() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.Dropout(0.2), nn.Tanh(), nn.Linear(16, 8))
    return dr.transform(model, (torch.randn(2, 12),), rank=dr.Fixed(2))


def test_the_cost_of_a_step_follows_the_flops_of_the_phases() -> None:
    net = made()
    assert cost_of(net) == 1
    dr.enter_(net, LOW)
    assert cost_of(net) == pytest.approx((2 * (12 + 16) + 2 * (16 + 8)) / (12 * 16 + 16 * 8))
    dr.enter_(net, {"3.*": FULL})
    assert cost_of(net) == pytest.approx((2 * (12 + 16) + 16 * 8) / (12 * 16 + 16 * 8))


def test_the_cost_counts_convolutions_by_flops_and_what_is_not_factored_as_dense() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(32, 10))
    net = dr.transform(model, (torch.zeros(2, 4, 4, 4),), rank=dr.Fixed(2), include=["0"])
    dr.enter_(net, LOW)
    dense, low, head = 4 * 8 * 4 * 9, 4 * (2 * 4 * 9 + 8 * 2), 32 * 10
    assert cost_of(net) == pytest.approx((low + head) / (dense + head))


def test_the_cost_is_by_parameters_where_no_example_told_the_flops() -> None:
    model = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 8)))
    net = dr.transform(model, rank=dr.Fixed(2))
    dr.enter_(net, LOW)
    dense = 12 * 16 + 16 + 16 * 8 + 8
    assert cost_of(net) == pytest.approx((2 * 28 + 16 + 2 * 24 + 8) / dense)


def test_cost_is_counted_in_one_unit_where_the_flops_of_a_site_are_unknown():
    net = dr.transform(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), (torch.zeros(1, 16),))
    first, second = dr.plan_of(net).sites
    blind = replace(
        second, site=replace(second.site, uses=tuple(replace(u, input_shape=None) for u in second.site.uses))
    )
    net.meta["dynrank"] = replace(dr.plan_of(net), sites=(first, blind))
    dr.enter_(net, dr.Phase.LOW)
    plan = dr.plan_of(net)
    assert cost_of(net) == plan.low_flops / plan.total_flops == 0.75, "half of one of two equal products is saved"


def test_an_adaptor_costs_its_branch_and_two_of_the_three_products_of_a_dense_step() -> None:
    net = made()
    dr.enter_(net, ADAPTOR)
    dense, low = 12 * 16 + 16 * 8, 2 * (12 + 16) + 2 * (16 + 8)
    assert cost_of(net) == pytest.approx(2 / 3 + low / dense)


def timed() -> nn.Module:
    """Whose first site takes 0.5 of a dense step and 0.1 factored, and its second 0.3 and 0.2."""
    net = made()
    plan = dr.plan_of(net)
    steps = ((0.5, 0.1), (0.3, 0.2))
    rows = tuple(replace(row, step=step) for row, step in zip(plan.sites, steps, strict=True))
    net.meta["dynrank"] = replace(plan, sites=rows, seconds=(1e-3, 5e-4))
    return net


def test_costs_are_counted_in_measured_time_where_that_is_asked_for() -> None:
    net = timed()
    state = dr.train_state(net, SGD(net.parameters(), lr=0.1), 0, 4, cost_by=dr.CostBy.TIME)
    assert [(site.dense, site.low) for site in state.sites.values()] == [(0.5, 0.1), (0.3, 0.2)]
    dr.enter_(net, {"0.*": LOW})
    assert cost_of(net, dr.CostBy.TIME) == pytest.approx(0.6)
    dr.enter_(net, LOW)
    assert cost_of(net, dr.CostBy.TIME) == pytest.approx(0.5) == dr.plan_of(net).low_time
    dr.enter_(net, ADAPTOR)
    assert cost_of(net, dr.CostBy.TIME) == pytest.approx(1 - 0.8 / 3 + 0.3)
    with pytest.raises(dr.ScheduleError, match="the plan has no measured times to count costs by: make it by"):
        cost_of(made(), dr.CostBy.TIME)
    with pytest.raises(dr.ScheduleError, match=r"cost_by is 'time': give one of CostBy\.FLOPS, CostBy\.TIME"):
        cost_of(net, "time")  # type: ignore[arg-type]


@pytest.mark.parametrize("by", dr.CostBy)
def test_the_budget_of_auto_is_kept_in_what_is_counted_and_records_have_both(by: dr.CostBy) -> None:
    net, budget = timed(), 0.75
    phases = dr.Phases(
        net, SGD(net.parameters(), lr=0.1), dr.schedules.auto(budget, tail=0.0, collapse=0.0), 20, cost_by=by, steps=1
    )
    flops = in_time = 0.0
    for epoch in range(20):
        record = phases.begin(epoch)
        flops += cost_of(net)
        in_time += cost_of(net, dr.CostBy.TIME)
        assert (record.spent, record.spent_time) == (pytest.approx(flops), pytest.approx(in_time))
    counted, price = (in_time, 0.5) if by is dr.CostBy.TIME else (flops, 1 - cost_of(net))
    assert budget * 20 - price < counted <= budget * 20 + 1e-9, "as much as it pays for, and no more"


@pytest.mark.parametrize(("by", "least"), [(dr.CostBy.FLOPS, "0.32"), (dr.CostBy.TIME, "0.5")])
def test_a_budget_below_what_low_alone_costs_is_told_when_phases_begin(by: dr.CostBy, least: str) -> None:
    def begin(cost: float) -> None:
        net = timed()
        dr.Phases(net, SGD(net.parameters(), lr=0.1), dr.schedules.auto(cost), 4, cost_by=by, steps=1)

    begin(float(least))
    sentence = f"^LOW alone costs {least} of dense training, and the schedule's budget is 0.3: it is not kept to; give"
    with pytest.warns(dr.DynrankWarning, match=sentence) as told:
        begin(0.3)
    assert len(told) == 1


def test_costs_in_time_need_times_from_the_first_epoch_on() -> None:
    net = made()
    optimizer = SGD(net.parameters(), lr=0.1)
    with pytest.raises(dr.ScheduleError, match="the plan has no measured times"):
        dr.Phases(net, optimizer, dr.schedules.auto(), 4, cost_by=dr.CostBy.TIME, steps=1)
    earlier = dr.Phases(net, optimizer, dr.schedules.auto(), 4, steps=1)
    assert earlier.history[0].spent_time is None
    assert "spent_time" not in earlier.history[0].to_json()
    state = earlier.state_dict()
    earlier.remove()
    later = timed()
    resumed = dr.Phases(
        later, SGD(later.parameters(), lr=0.1), dr.schedules.auto(), 4, cost_by=dr.CostBy.TIME, steps=1, resume=state
    )
    with pytest.raises(dr.ScheduleError, match="the run's records so far tell no measured time"):
        resumed.begin(1)
