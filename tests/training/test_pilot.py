"""Short runs of equal compute: each takes what it says, and the best small one is named."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dynrank_fx as dr
from dynrank_fx.errors import DivergedError
from dynrank_fx.training import CostBy, Pilot, Settings, Task, Trial, pilot

FULL, LOW = dr.schedules.always(dr.Phase.FULL), dr.schedules.always(dr.Phase.LOW)


def _model(width: int = 32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))


def _task() -> Task:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 8, 16, generator=generator)
    batches = [(each, (each[:, :4].sum(1) > 0).long()) for each in x]
    loss = lambda output, batch: nn.functional.cross_entropy(output, batch[1])  # noqa: E731
    metric = lambda output, batch: (output.argmax(1) == batch[1]).float().mean()  # noqa: E731
    return Task(batches[:30], loss, lambda batch: ((batch[0],), {}), batches[30:], metric)


def _net(model: nn.Module, **options: object) -> nn.Module:
    return dr.transform(model, (torch.zeros(2, 16),), **options)


def _found(**options: object) -> Pilot:
    settings = Settings(steps=60, compile=False)
    net = _net(_model(), rank=dr.Ratio(0.25), leave=())
    return pilot(net, _task(), partial(torch.optim.AdamW, lr=1e-2), settings, **options)


def test_every_way_takes_the_compute_of_the_dense_steps_and_says_what_it_leaves() -> None:
    begun: list[tuple[str, int]] = []
    narrow = _net(_model(16), rank=dr.Ratio(0.25), leave=())
    found = _found(narrower=narrow, begun=lambda *each: begun.append(each))
    ways = ["dense, as it is", "LOW alone", "auto, 12% FULL", "auto, 40% FULL", "narrower dense"]
    assert [(each.way, each.steps) for each in found.trials] == begun
    assert [each.way for each in found.trials] == ways
    assert all(each.compute == pytest.approx(60, rel=0.06) for each in found.trials)
    dense, low, early, later, narrower = found.trials
    assert dense.steps == 60
    assert low.steps > early.steps > later.steps > 60
    plan = dr.plan_of(_net(_model(), rank=dr.Ratio(0.25), leave=()))
    assert plan.low_flops is not None
    assert plan.total_flops
    sizes = [low.size, early.size, later.size]
    assert sizes == pytest.approx([plan.low_flops / plan.total_flops] * 3)
    assert narrower.size == pytest.approx((16 * 16 * 2 + 16 * 2) / (16 * 32 + 32 * 32 + 32 * 2))
    assert [each.schedule for each in found.trials] == [
        FULL, LOW, dr.schedules.auto(early.cost), dr.schedules.auto(later.cost), FULL,
    ]  # fmt: skip
    shares = [early.cost, later.cost]
    assert shares == pytest.approx([low.size + share * (1 - low.size) for share in (0.12, 0.4)], abs=1e-3)
    assert [dense.cost, low.cost, narrower.cost] == pytest.approx([1, low.size, narrower.size])
    assert all(0 < each.loss < 0.6 for each in found.trials), "it learns, where chance is 0.69"
    assert all(each.metric is not None and each.metric > 0.7 for each in found.trials)


@pytest.mark.parametrize("decays", [True, False])
def test_the_learning_rate_falls_or_stays_as_the_long_run_will_have_it(decays: bool) -> None:
    rates: list[float] = []

    class Watched(torch.optim.SGD):
        def step(self, *args: object, **kwargs: object) -> None:
            rates.append(self.param_groups[0]["lr"])
            super().step(*args, **kwargs)

    net = _net(_model(), rank=dr.Ratio(0.25), leave=())
    pilot(net, _task(), partial(Watched, lr=1e-2), Settings(steps=40, compile=False), decays=decays)
    dense = rates[:40]
    wanted = [0.5 * (1 + math.cos(math.pi * step / 40)) if decays else 1.0 for step in range(40)]
    assert dense[2:] == pytest.approx([0.01 * each for each in wanted[2:]])
    assert dense[0] == pytest.approx(0.005)


def test_every_way_sees_the_same_data_and_the_generator_of_the_data_stays_where_it_was() -> None:
    drawn: list[torch.Tensor] = []
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(320, 16), torch.randint(2, (320,))

    def loss(output: torch.Tensor, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        drawn.append(batch[0])
        return nn.functional.cross_entropy(output, batch[1])

    data = DataLoader(TensorDataset(x, y), 8, shuffle=True, generator=generator)
    before, begun = generator.get_state(), list[int]()
    net = _net(_model(), rank=dr.Ratio(0.25), leave=())
    pilot(
        net,
        Task(data, loss, lambda batch: ((batch[0],), {})),
        partial(torch.optim.AdamW, lr=1e-2),
        Settings(steps=20, compile=False),
        begun=lambda way, steps: begun.append(len(drawn)),
    )
    assert all(torch.equal(drawn[at], drawn[0]) for at in begun)
    assert torch.equal(generator.get_state(), before)


def test_a_way_that_diverges_comes_last(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(way: object, *args: object) -> Trial:
        if "LOW" in way.name or ("auto" in way.name and gone):  # type: ignore[attr-defined]
            raise DivergedError("gone")
        return replace(_trial(way.name, 1.0), schedule=way.schedule, cost=way.cost)  # type: ignore[attr-defined]

    gone = False
    monkeypatch.setattr(sys.modules["dynrank_fx.training.pilot"], "_tried", fails)  # the room has a function so called
    found = _found()
    low = found.trials[1]
    assert (low.loss, low.to_json()["loss"]) == (math.inf, None)
    assert found.small[-1] is low
    assert found.best_factored.way == "auto, 12% FULL"
    gone = True
    with pytest.raises(DivergedError, match="every factored way diverged in the pilot"):
        _found()


def test_where_low_is_no_cheaper_there_is_no_mixture() -> None:
    net = _net(_model(), rank=dr.Fixed(30), leave=(), allow_unprofitable=True)
    found = pilot(net, _task(), partial(torch.optim.AdamW, lr=1e-2), Settings(steps=20, compile=False))
    assert [each.way for each in found.trials] == ["dense, as it is", "LOW alone"]


def test_the_net_stays_as_it_was_and_the_same_seed_gives_the_same() -> None:
    first, again = _found(seed=3), _found(seed=3)
    assert [each.loss for each in first.trials] == [each.loss for each in again.trials]


def _trial(way: str, loss: float, schedule: dr.schedules.Schedule = FULL, cost: float = 0.4) -> Trial:
    return Trial(way, (), 60, 60.0, cost, loss, None, 1.0, schedule, cost)


def test_the_best_is_the_factored_one_where_a_narrower_one_is_level() -> None:
    dense, low = _trial("dense", 0.5), _trial("LOW", 1.002, LOW)
    assert Pilot((dense, low, _trial("narrower", 1.0))).best is low
    below = _trial("LOW", -1.002, LOW)
    assert Pilot((dense, below, _trial("narrower", -1.0))).best is below
    assert Pilot((dense, _trial("LOW", -0.9, LOW), _trial("narrower", -1.0))).best.way == "narrower"
    narrow, found = _trial("narrower", 0.9), Pilot((dense, low, _trial("narrower", 0.9)))
    assert found.best == narrow
    assert found.best_factored is low


def test_full_steps_are_taken_only_where_they_are_measured_to_pay() -> None:
    dense, low = _trial("dense", 0.5), _trial("LOW", 1.0, LOW)
    level, better = (_trial("auto", loss, dr.schedules.auto(0.5), 0.5) for loss in (0.996, 0.9))
    assert Pilot((dense, low, level)).best_factored is Pilot((dense, low, level)).best is low
    assert Pilot((dense, low, better)).best_factored is Pilot((dense, low, better)).best is better
    assert [each.factored for each in (dense, low, better)] == [False, True, True]


def test_a_trial_is_json_with_its_schedule_in_words() -> None:
    made = json.loads(json.dumps(_trial("LOW", 1.0, LOW).to_json()))
    assert made["schedule"] == repr(LOW)
    assert made["options"] == []
    assert (made["way"], made["loss"], made["cost"], made["metric"]) == ("LOW", 1.0, 0.4, None)


def test_what_saves_parameters_alone_is_among_the_small_ones() -> None:
    """Factors of an embedding leave its FLOPs as they are, which are none."""
    dense, low = _trial("dense", 0.5), _trial("LOW", 0.6, LOW, 1.0)
    assert Pilot((dense, low)).best is low


def test_in_measured_time_every_way_takes_the_time_of_the_dense_steps() -> None:
    """The three sites take 0.2, 0.5 and 0.1 of a dense step, and half of that factored."""
    net, narrow = (_net(_model(width), rank=dr.Ratio(0.25), leave=()) for width in (32, 16))
    plan = dr.plan_of(net)
    steps = ((0.2, 0.1), (0.5, 0.25), (0.1, 0.05))
    rows = tuple(replace(row, step=step) for row, step in zip(plan.sites, steps, strict=True))
    net.meta["dynrank"] = replace(plan, sites=rows, seconds=(1e-3, 6e-4))
    settings = Settings(steps=40, compile=False, cost_by=CostBy.TIME)
    tried = partial(pilot, net, _task(), partial(torch.optim.AdamW, lr=1e-2), settings)
    found = tried(narrower=narrow, narrower_cost=0.8)
    assert [each.cost for each in found.trials] == pytest.approx([1, 0.6, 0.6 + 0.12 * 0.4, 0.6 + 0.4 * 0.4, 0.8])
    assert [each.steps for each in found.trials] == [40, 67, 62, 53, 50]
    assert all(each.compute == pytest.approx(40, rel=0.06) for each in found.trials)
    assert found.trials[-1].size == pytest.approx((16 * 16 * 2 + 16 * 2) / (16 * 32 + 32 * 32 + 32 * 2)), "FLOPs"
    with pytest.raises(dr.DynrankError, match="a step of the narrower model cannot cost None of the time of a dense"):
        tried(narrower=narrow)


def test_costs_in_a_time_that_was_not_measured_are_refused() -> None:
    net = _net(_model(), rank=dr.Ratio(0.25), leave=())
    with pytest.raises(dr.ScheduleError, match="the plan has no measured times to count costs by"):
        pilot(net, _task(), torch.optim.AdamW, Settings(steps=20, cost_by=CostBy.TIME))


def test_too_few_steps_are_refused() -> None:
    net = _net(_model(), rank=dr.Ratio(0.25), leave=())
    with pytest.raises(dr.DynrankError, match="a pilot of 5 steps says nothing"):
        pilot(net, _task(), torch.optim.AdamW, Settings(steps=5))
