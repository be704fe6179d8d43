"""The clock of a run: ticks of steps, which begin by themselves, and between which it can be taken up again."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR, StepLR

import dynrank_fx as dr
from dynrank_fx.training import clock_of
from dynrank_fx.training.clock import StepHook

FULL, LOW = dr.Phase.FULL, dr.Phase.LOW
X = torch.randn(24, 12, generator=torch.Generator().manual_seed(1))
Y = X.roll(3, 1)[:, :8].contiguous()


def made(rank: int = 2) -> nn.Module:
    torch.manual_seed(0)
    return dr.transform(nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8)), (X[:2],), rank=dr.Fixed(rank))


def train(net: nn.Module, optimizer: Optimizer, steps: int, start: int = 0, scheduler: Any = None) -> None:
    """The order of most tutorials: the gradients of a step stay until the next one."""
    batches: Iterator[tuple[Tensor, Tensor]] = itertools.cycle(zip(X.split(8), Y.split(8), strict=True))
    for x, y in itertools.islice(batches, start, start + steps):
        optimizer.zero_grad()
        nn.functional.mse_loss(net(x), y).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def alternating(state: dr.TrainState) -> dr.Phase:
    return FULL if state.epoch % 2 else LOW


# Ticks


@pytest.mark.parametrize(
    ("given", "ticks", "every", "unit"),
    [
        ((10, None, None), 10, None, "epoch"),
        ((10, 7, None), 10, 7, "epoch"),
        ((1, None, None), 1, None, "epoch"),
        ((1, 100, None), 20, 5, "tick"),
        ((None, 100, None), 20, 5, "tick"),
        ((None, 101, None), 17, 6, "tick"),
        ((None, 3, None), 3, 1, "tick"),
        ((None, 100, 30), 4, 30, "tick"),
        ((3, 100, 30), 10, 30, "tick"),
    ],
)
def test_a_tick_is_an_epoch_or_a_twentieth_of_the_run(given: Any, ticks: int, every: int | None, unit: str) -> None:
    clock = clock_of(*given)
    assert (clock.ticks, clock.every, clock.unit) == (ticks, every, unit)
    if every is not None:
        assert clock.start(0) == 0
        assert clock.start(clock.ticks - 1) < clock.start(clock.ticks) == (given[0] or 1) * given[1]


def test_ticks_begin_by_themselves_after_the_step_before_them() -> None:
    net = made()
    optimizer = AdamW(net.parameters(), lr=0.01)
    phases = dr.Phases(net, optimizer, alternating, steps=50, every=20)
    seen = []
    for step in range(60):
        seen.append(dr.phases_of(net)["0.weight"])
        train(net, optimizer, 1, step)
    assert seen == [LOW] * 20 + [FULL] * 20 + [LOW] * 20, "a run that is longer than was said stays as it is"
    assert [(record.epoch, record.step) for record in phases.history] == [(0, 0), (1, 20), (2, 40)]
    assert phases.step == 60
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in net.parameters()}


def test_a_run_by_itself_is_that_of_a_loop_that_begins_its_epochs() -> None:
    def run(by_itself: bool) -> tuple[nn.Module, list[Any]]:
        net = made()
        optimizer = AdamW(net.parameters(), lr=0.01, weight_decay=0.1)
        scheduler = StepLR(optimizer, 5, 0.5)
        choices: Any = {"decay": dr.Decay.PRODUCT, "landing": True, "rewarm": 4, "lr_every_step": True}
        schedule = dr.schedules.join([dr.schedules.interleave(low=1, full=2), dr.schedules.always(LOW)], [6])
        phases = dr.Phases(net, optimizer, schedule, 8, scheduler, steps=6, **choices)
        for epoch in range(8):
            if not by_itself:
                optimizer.zero_grad()
                phases.begin(epoch)
            train(net, optimizer, 6, 6 * epoch, scheduler)
        return net, [record.with_figures(switch_seconds=0.0) for record in phases.history]

    net, history = run(by_itself=True)
    expected, told = run(by_itself=False)
    assert history == told
    assert [record.phase for record in history] == ["LOW", "FULL", "FULL"] * 2 + ["LOW"] * 2
    assert max(history[3].switch_error.values()) < 1e-5, "it landed"
    assert all(map(torch.equal, net.state_dict().values(), expected.state_dict().values()))


def test_one_epoch_gives_auto_as_much_room_as_twenty() -> None:
    def share_full(**length: Any) -> float:
        net = made(1)
        optimizer = AdamW(net.parameters(), lr=0.01)
        scheduler = CosineAnnealingLR(optimizer, 100)
        phases = dr.Phases(
            net, optimizer, dr.schedules.auto(0.75, tail=0.0), lr_scheduler=scheduler, lr_every_step=True, **length
        )
        full = 0
        for step in range(100):
            full += sum(phase is FULL for phase in dr.phases_of(net).values())
            train(net, optimizer, 1, step, scheduler)
        assert len(phases.history) == 20
        assert phases.history[0].phase == "FULL"
        assert phases.history[-1].phase == "LOW"
        assert phases.history[-1].spent <= 0.75 * 20 + 1e-6
        return full / 200

    assert 0.2 < share_full(epochs=20, steps=5) == share_full(epochs=1, steps=100) == share_full(steps=100)
    assert share_full(steps=100) == share_full(epochs=2, steps=50) == share_full(epochs=4, steps=25)


def test_a_loop_that_begins_its_one_epoch_ticks_within_it() -> None:
    net = made()
    optimizer = SGD(net.parameters(), lr=0.1)
    phases = dr.Phases(net, optimizer, alternating, 1, steps=4)
    assert phases.begin(0) is phases.history[0]
    train(net, optimizer, 4)
    assert [record.phase for record in phases.history] == ["LOW", "FULL", "LOW", "FULL"]


def test_an_accumulated_step_is_one() -> None:
    net = made()
    optimizer = SGD(net.parameters(), lr=0.1)
    phases = dr.Phases(net, optimizer, alternating, steps=4, every=2)
    for batch, (x, y) in enumerate(zip(X.split(3), Y.split(3), strict=True), 1):
        nn.functional.mse_loss(net(x), y).backward()
        if batch % 2 == 0:
            optimizer.step()
            optimizer.zero_grad()
    assert phases.step == 4
    assert [record.step for record in phases.history] == [0, 2]


def test_steps_of_several_optimizers_and_of_subclasses_count_once() -> None:
    class Sub(SGD):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    one, other = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    one.grad, other.grad = torch.ones(1), torch.ones(1)
    SGD([one], lr=0.1).step()  # torch wraps the base's step when it is first used
    first, second, steps = Sub([one], lr=0.1), SGD([other], lr=0.1), []
    hook = StepHook((first, second), lambda: steps.append(1))
    for _ in range(3):
        first.step()
        second.step()
    assert len(steps) == 3
    hook.remove()
    second.step()
    first.step()
    assert len(steps) == 3


def scaled(net: nn.Module, optimizer: Optimizer, steps: int, overflows: Any, phases: Any = None) -> list[dr.Phase]:
    """A loop with a scaler, in which these steps overflow, and are skipped; the phase of each step."""
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    phases = phases(scaler)
    seen = []
    for step in range(steps):
        x, y = X[step % 3 * 8 :][:8], Y[step % 3 * 8 :][:8]
        seen.append(dr.phases_of(net)["0.weight"])
        optimizer.zero_grad()
        scaler.scale(nn.functional.mse_loss(net(x), y) * (float("inf") if step in overflows else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
    return seen


@pytest.mark.parametrize(
    "overflows", [(), (0, 1, 2), (9, 19), (18, 19), range(20)], ids=["none", "first", "ticks", "cut", "all"]
)
def test_steps_that_a_scaler_skips_count_as_in_the_loop(overflows: Any) -> None:
    """Ticks are where the loop has them, one may begin in the place of a step, and a landing is done in time."""
    net = made()
    optimizer = AdamW(net.parameters(), lr=0.01)
    schedule = dr.schedules.warm_up(2)
    made_phases = []

    def phases(scaler: Any) -> None:
        made_phases.append(dr.Phases(net, optimizer, schedule, steps=30, every=10, landing=True, scaler=scaler))

    assert scaled(net, optimizer, 30, overflows, phases) == [FULL] * 20 + [LOW] * 10
    (one,) = made_phases
    assert one.step == 30
    assert [record.step for record in one.history] == [0, 10, 20]
    assert max(one.history[2].switch_error.values()) < 1e-5, "it landed before"
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in net.parameters()}
    assert all(torch.isfinite(p).all() for p in net.parameters())


def test_without_the_scaler_the_clock_is_late_by_the_steps_that_were_skipped() -> None:
    net = made()
    optimizer = AdamW(net.parameters(), lr=0.01)
    schedule = dr.schedules.warm_up(2)
    seen = scaled(net, optimizer, 30, (3, 4, 5), lambda scaler: dr.Phases(net, optimizer, schedule, steps=30, every=10))
    assert seen == [FULL] * 23 + [LOW] * 7


def test_of_several_optimizers_one_may_be_skipped_and_what_is_removed_counts_no_more() -> None:
    net = made()
    split = [[p for p in net.parameters() if (p.ndim > 1) is matrices] for matrices in (True, False)]
    optimizers = [SGD(split[0], lr=0.1), SGD(split[1], lr=0.1)]
    other = SGD([stranger := nn.Parameter(torch.zeros(1))], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    phases = dr.Phases(net, optimizers, alternating, steps=20, every=5, scaler=scaler)

    def step(overflows: bool) -> None:
        scaler.scale(nn.functional.mse_loss(net(X), Y) + stranger.sum() * float("inf")).backward()
        for each in optimizers:
            if overflows:
                each.param_groups[0]["params"][0].grad.fill_(float("inf"))
                overflows = False
            scaler.step(each)
            each.zero_grad()
        scaler.step(other)
        scaler.update()

    for number in range(6):
        step(overflows=number % 2 == 0)
        assert phases.step == number + 1
    assert [record.step for record in phases.history] == [0, 5]
    phases.remove()
    step(overflows=True)
    assert phases.step == 6


# Few epochs


class Turning:
    """FULL and LOW in turn, whatever the ticks are."""

    within_epochs = True

    def __call__(self, state: dr.TrainState) -> dr.Phase:
        return alternating(state)


@pytest.mark.parametrize(
    ("epochs", "steps", "parts"), [(2, 50, 10), (3, 100, 7), (5, 100, 4), (5, 3, 3), (3, 7, 7), (4, 1, 1)]
)
def test_few_epochs_are_divided_for_a_schedule_that_does_not_count_them(epochs: int, steps: int, parts: int) -> None:
    clock = clock_of(epochs, steps).divided(Turning())
    starts = [clock.start(tick) for tick in range(clock.ticks + 1)]
    assert clock.ticks == parts * epochs
    assert starts[::parts] == [epoch * steps for epoch in range(epochs + 1)], "every epoch begins with a tick"
    lengths = {b - a for a, b in itertools.pairwise(starts)}
    assert lengths <= {steps // parts, -(-steps // parts)}
    assert [clock.begins_epoch(tick) for tick in range(parts)] == [True] + [False] * (parts - 1)
    assert [clock.ends_epoch(tick) for tick in range(parts)] == [False] * (parts - 1) + [True]
    assert clock.whole() == clock_of(epochs, steps)


@pytest.mark.parametrize("length", [(6, 100), (3, None), (3, 100, 20), (1, 100), (None, 100)])
def test_other_runs_are_divided_as_they_were(length: Any) -> None:
    clock = clock_of(*length)
    assert clock.divided(Turning()) is clock


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ((3, 10), (5, 10)),
        ((5, 10), (8, 10)),
        ((2, 50), (2, 50)),
        ((None, 100), (None, 200)),
        ((None, 100, 20), (None, 130)),
        ((1, 98), (2, 98)),
        ((1, 98), (9, 98)),
    ],
)
def test_a_run_that_gets_another_length_goes_on_in_its_ticks(old: Any, new: Any) -> None:
    before, after = (clock_of(*each).divided(Turning()) for each in (old, new))
    clock = after.going_on({tick: before.start(tick) for tick in range(before.ticks)})
    assert [clock.start(tick) for tick in range(before.ticks)] == [before.start(tick) for tick in range(before.ticks)]
    assert clock.steps == after.steps
    assert clock.start(clock.ticks - 1) < clock.steps <= clock.start(clock.ticks)


def test_ticks_of_a_run_that_fit_no_other_are_those_of_the_new_length() -> None:
    clock = clock_of(None, 100)
    assert clock.going_on({0: 0, 1: 7, 2: 9}) is clock


def test_a_run_that_goes_on_longer_counts_every_step() -> None:
    net = made()
    optimizer = SGD(net.parameters(), lr=0.1)
    first = dr.Phases(net, optimizer, alternating, steps=8, every=2)
    train(net, optimizer, 8)
    first.remove()
    phases = dr.Phases(net, optimizer, alternating, steps=16, resume=first.state_dict())
    for number in range(8):
        assert phases.step == 8 + number
        train(net, optimizer, 1)
    assert [record.step for record in phases.history] == [0, 2, 4, 6, 9, 10, 12, 14], "the fifth waited for a step"


def test_a_loop_that_begins_each_tick_has_whole_epochs() -> None:
    net = made()
    phases = dr.Phases(net, SGD(net.parameters(), lr=0.1), Turning(), 3, steps=10, by_itself=False)
    assert phases.clock == clock_of(3, 10)


def test_a_schedule_that_counts_epochs_keeps_them() -> None:
    net = made()
    optimizer = SGD(net.parameters(), lr=0.1)
    schedule = dr.schedules.join([dr.schedules.always(FULL), dr.schedules.always(LOW)], [2])
    phases = dr.Phases(net, optimizer, schedule, 5, steps=10)
    seen = []
    for step in range(50):
        seen.append(dr.phases_of(net)["0.weight"])
        train(net, optimizer, 1, step)
    assert seen == [FULL] * 20 + [LOW] * 30
    assert [record.unit for record in phases.history] == ["epoch"] * 5


def in_epochs(begins: bool, stop: int | None = None) -> tuple[Any, list[Any], list[Any]]:
    """Three epochs of ten steps, in 21 ticks, with a scheduler of epochs. stop: where it is saved and gone on with."""
    told: list[Any] = []

    class Told(Turning):
        def __call__(self, state: dr.TrainState) -> dr.Phase:
            if len(told) == state.epoch:
                told.append((state.epochs, state.lr, state.lrs))
            return FULL if state.epoch % 3 else LOW

    def parts(net: nn.Module, resume: Any = None) -> Any:
        optimizer = AdamW(net.parameters(), lr=0.01, weight_decay=0.1)
        scheduler = StepLR(optimizer, 1, 0.5)
        choices: Any = {"decay": dr.Decay.PRODUCT, "landing": True, "rewarm": 2, "resume": resume}
        return dr.Phases(net, optimizer, Told(), 3, scheduler, steps=10, **choices), net, optimizer, scheduler

    now = parts(made())
    for step in range(30):
        if step == stop:
            states = copy.deepcopy([part.state_dict() for part in now])
            again = made()
            dr.resume_phases_(again, states[0])
            again.load_state_dict(states[1])
            now = parts(again, states[0])
            for part, state in zip(now[2:], states[2:], strict=True):
                part.load_state_dict(state)
        phases, net, optimizer, scheduler = now
        if step % 10 == 0 and begins:
            before = dr.phases_of(net)
            record = phases.begin(step // 10)
            assert record.epoch == 7 * (step // 10)
            assert step == 0 or before["0.weight"] is FULL or record.epoch % 3, "it has waited for the call"
        train(net, optimizer, 1, step)
        if step % 10 == 9:
            scheduler.step()
    records = [record.with_figures(switch_seconds=0.0) for record in now[0].history]
    return now[1].state_dict(), records, told


def test_ticks_within_epochs_begin_by_themselves_and_epochs_by_the_loop_where_it_begins_them() -> None:
    weights, records, told = in_epochs(begins=True)
    alone, recorded, told_alone = in_epochs(begins=False)
    assert records == recorded
    assert told == told_alone
    assert [record.step for record in records] == [10 * (i // 7) + i % 7 * 10 // 7 for i in range(21)]
    rates = [0.01 * 0.5 ** (i // 7) for i in range(21)]
    assert [record.lr for record in records] == pytest.approx(rates)
    assert all(ticks == 21 and lrs == pytest.approx(rates) for ticks, _, lrs in told)
    assert all(map(torch.equal, weights.values(), alone.values()))


@pytest.mark.parametrize("begins", [True, False])
@pytest.mark.parametrize("stop", [1, 4, 10, 11, 17, 20])
def test_a_run_of_divided_epochs_goes_on_from_between_any_two_steps_bit_by_bit(stop: int, begins: bool) -> None:
    weights, records, _ = in_epochs(begins)
    again, recorded, _ = in_epochs(begins, stop)
    assert all(map(torch.equal, weights.values(), again.values()))
    assert [record.phases for record in recorded] == [record.phases for record in records]


def test_an_epoch_that_is_shorter_than_was_said_leaves_out_its_last_ticks() -> None:
    net, told = made(), []

    class Told(Turning):
        def __call__(self, state: dr.TrainState) -> dr.Phase:
            told.append((state.epoch, len(state.lrs)))
            return LOW

    optimizer = SGD(net.parameters(), lr=0.1)
    phases = dr.Phases(net, optimizer, Told(), 2, steps=10)
    for epoch in range(2):
        phases.begin(epoch)
        train(net, optimizer, 6)
    assert [record.epoch for record in phases.history] == [*range(7), *range(10, 17)]
    assert [record.step for record in phases.history] == [*range(7), *range(10, 17)]
    assert {count for _, count in told} == {20}, "the learning rates are known all the same"
    assert repr(phases).startswith("Phases(tick 17 of 20, step 16, LOW; the next decision after step 17")


def test_a_state_in_whole_epochs_goes_on_in_them() -> None:
    """As it was written before they were divided."""
    net = made()
    optimizer = SGD(net.parameters(), lr=0.1)
    state = dr.Phases(net, optimizer, alternating, 3, steps=10).state_dict()
    net = made()
    dr.resume_phases_(net, state)
    optimizer = SGD(net.parameters(), lr=0.1)
    phases = dr.Phases(net, optimizer, Turning(), 3, steps=10, resume=state)
    train(net, optimizer, 30)
    assert [record.phase for record in phases.history] == ["LOW", "FULL", "LOW"]


# Learning rates


@pytest.mark.parametrize("every_step", [True, False])
def test_the_rates_that_a_schedule_is_told_are_those_that_come(every_step: bool) -> None:
    net, told = made(), []

    def schedule(state: dr.TrainState) -> dr.Phase:
        if len(told) == state.epoch:
            told.append((state.lr, state.lrs))
        return alternating(state)

    optimizer = SGD(net.parameters(), lr=0.1)
    scheduler = CosineAnnealingLR(optimizer, 60 if every_step else 3)
    dr.Phases(net, optimizer, schedule, 3, scheduler, steps=20, every=5, lr_every_step=every_step)
    came = []
    for step in range(60):
        if step % 5 == 0:
            came.append(optimizer.param_groups[0]["lr"])
        train(net, optimizer, 1, step, scheduler if every_step else None)
        if not every_step and step % 20 == 19:
            scheduler.step()
    assert [lr for lr, _ in told] == pytest.approx(came)
    assert all(lrs == pytest.approx(came) for _, lrs in told)


def test_a_cycle_that_is_stepped_too_seldom_or_too_often_is_a_warning() -> None:
    def phases(total: int, **given: Any) -> None:
        net = made()
        optimizer = SGD(net.parameters(), lr=0.1)
        scheduler = OneCycleLR(optimizer, 0.1, total_steps=total)
        dr.Phases(net, optimizer, dr.schedules.always(FULL), lr_scheduler=scheduler, **given)

    with pytest.warns(dr.DynrankWarning, match="OneCycleLR plans 40 steps and is stepped 4 times, once an epoch"):
        phases(40, epochs=4, steps=10)
    with pytest.warns(dr.DynrankWarning, match="plans 30 steps and is stepped 40 times, .* give it total_steps=40"):
        phases(30, steps=40)
    phases(40, epochs=4, steps=10, lr_every_step=True)
    phases(40, steps=40)
    phases(5, epochs=4)


# Resuming


@pytest.mark.parametrize("stop", [3, 7, 8, 13, 19, 20])
def test_a_run_goes_on_from_between_any_two_steps_bit_by_bit(stop: int) -> None:
    """Seven steps are the first tick, and the landing before the cut at 21, and a re-warm-up, are under way."""

    def begin(net: nn.Module, resume: Any = None) -> tuple[dr.Phases, Optimizer, Any]:
        optimizer = AdamW(net.parameters(), lr=0.01, weight_decay=0.1)
        scheduler = CosineAnnealingLR(optimizer, 28)
        choices: Any = {"landing": True, "rewarm": 4, "decay": dr.Decay.PRODUCT, "resume": resume}
        schedule = dr.schedules.FullBetween(1, 3)
        return (
            dr.Phases(net, optimizer, schedule, lr_scheduler=scheduler, steps=28, every=7, **choices),
            optimizer,
            scheduler,
        )

    whole = made()
    expected, optimizer, scheduler = begin(whole)
    train(whole, optimizer, 28, 0, scheduler)

    net = made()
    phases, optimizer, scheduler = begin(net)
    train(net, optimizer, stop, 0, scheduler)
    parts = (phases, net, optimizer, scheduler)
    states = [part.state_dict() for part in parts]
    for way in ("resume", "load_state_dict"):
        state, weights, moments, rates = copy.deepcopy(states)
        again = made()
        dr.resume_phases_(again, state)
        again.load_state_dict(weights)
        phases, optimizer, scheduler = begin(again, state if way == "resume" else None)
        optimizer.load_state_dict(moments)
        scheduler.load_state_dict(rates)
        if way == "load_state_dict":
            phases.load_state_dict(state)
        train(again, optimizer, 28 - stop, stop, scheduler)
        assert all(map(torch.equal, again.state_dict().values(), whole.state_dict().values()))
        assert [record.phases for record in phases.history] == [record.phases for record in expected.history]
        assert phases.step == 28


def test_a_state_of_other_phases_and_one_that_was_forgotten_are_refused() -> None:
    def phases(net: nn.Module, schedule: Any) -> tuple[dr.Phases, Optimizer]:
        optimizer = SGD(net.parameters(), lr=0.1)
        return dr.Phases(net, optimizer, schedule, steps=20), optimizer

    state = phases(made(), dr.schedules.always(LOW))[0].state_dict()
    with pytest.raises(dr.StoreError, match="the net is in other phases than the state is of: call resume_phases_"):
        phases(made(), dr.schedules.always(FULL))[0].load_state_dict(state)
    net = made()
    dr.resume_phases_(net, state)
    _, optimizer = phases(net, dr.schedules.always(FULL))
    assert set(dr.phases_of(net).values()) == {LOW}, "it waits for the state"
    with pytest.raises(dr.ScheduleError, match="where the run stood is not known: give Phases the state"):
        train(net, optimizer, 1)


# Refusals


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({}, "needs an end: give the steps of the run, or its epochs"),
        ({"steps": 0}, "a run cannot have 0 steps: give a whole number of 1 or more"),
        ({"epochs": 10**30}, rf"a run of {10**30} epochs is longer than can be planned: give 1,000,000 or less"),
        ({"steps": 10**30, "every": 3}, r"a run of \d+ ticks is longer than can be planned"),
        ({"steps": 1.5}, r"a run cannot have 1\.5 steps"),
        ({"steps": 10, "every": 0}, "a tick cannot have 0 steps"),
        ({"epochs": 10, "every": 3}, "needs an end: give the steps of the run"),
        ({"steps": 10, "scaler": 8.0}, r"scaler is 8\.0: give a GradScaler, or leave it out"),
    ],
)
def test_lengths_that_cannot_be(given: dict[str, Any], sentence: str) -> None:
    net = made()
    with pytest.raises(dr.ScheduleError, match=sentence):
        dr.Phases(net, SGD(net.parameters(), lr=0.1), dr.schedules.always(LOW), **given)


def test_weights_of_other_phases_that_are_loaded_under_way_are_told_at_the_next_step() -> None:
    net = dr.transform(nn.Sequential(nn.Linear(16, 16)), (torch.randn(2, 16),), rank=dr.Fixed(2))
    state = net.state_dict()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    dr.Phases(net, optimizer, dr.schedules.always(dr.Phase.LOW), steps=20)
    net.load_state_dict(state)
    with pytest.raises(dr.TransitionError, match="loaded into the net after the optimizer was made"):
        optimizer.step()


def test_epochs_that_nobody_begins_are_told_once() -> None:
    net = dr.transform(nn.Sequential(nn.Linear(16, 16)), (torch.randn(2, 16),), rank=dr.Fixed(2))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    dr.Phases(net, optimizer, dr.schedules.always(dr.Phase.LOW), epochs=3)
    with pytest.warns(dr.DynrankWarning, match="no epoch has begun: call phases.begin"):
        optimizer.step()
    optimizer.step()


def test_a_step_that_raises_does_not_stop_the_clock_or_keep_a_rate() -> None:
    """As of a loop that goes on after it has run out of memory."""

    class Failing(torch.optim.SGD):
        fails = False

        def step(self, closure: Any = None) -> Any:  # type: ignore[override]
            if self.fails:
                raise MemoryError("none left")
            return super().step(closure)  # torch runs the hooks for both

    net = dr.transform(nn.Sequential(nn.Linear(16, 16)), (torch.randn(2, 16),), rank=dr.Fixed(2))
    optimizer = Failing(net.parameters(), lr=0.1)
    phases = dr.Phases(net, optimizer, dr.schedules.interleave(low=1, full=1), steps=8, every=2, rewarm=3)
    rates = []
    for number in range(8):
        optimizer.fails = True
        with pytest.raises(MemoryError):
            optimizer.step()
        optimizer.fails = False
        optimizer.step()
        rates.append(optimizer.param_groups[0]["lr"])
        assert phases.step == number + 1
    assert [record.phase for record in phases.history] == ["LOW", "FULL", "LOW", "FULL"]
    assert rates == [0.1] * 8


def test_an_optimizer_has_one_phases() -> None:
    net = dr.transform(nn.Sequential(nn.Linear(16, 16)), (torch.randn(2, 16),), rank=dr.Fixed(2))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    first = dr.Phases(net, optimizer, dr.schedules.always(dr.Phase.LOW), steps=20)
    with pytest.raises(dr.TransitionError, match="this optimizer has Phases already"):
        dr.Phases(net, optimizer, dr.schedules.always(dr.Phase.FULL), steps=20)
    assert set(dr.phases_of(net).values()) == {dr.Phase.LOW}
    first.remove()
    dr.Phases(net, optimizer, dr.schedules.always(dr.Phase.FULL), steps=20)
    assert set(dr.phases_of(net).values()) == {dr.Phase.FULL}
