"""Phases in a loop of one's own: each epoch begins in what the schedule says, on record, and a checkpoint goes on."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import torch
from several import in_processes
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW

import dynrank_fx as dr
from dynrank_fx.processes import digest_of
from dynrank_fx.rewrite import switched_modules
from dynrank_fx.schedules import Decision, EpochRecord, Setting
from dynrank_fx.training import PhaseSettings, cost_of

FULL, LOW, ADAPTOR = dr.Phase.FULL, dr.Phase.LOW, dr.Phase.ADAPTOR
X = torch.randn(24, 12, generator=torch.Generator().manual_seed(1))
Y = X.roll(3, 1)[:, :8].contiguous()


def made() -> nn.Module:
    torch.manual_seed(0)
    return dr.transform(nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8)), (X[:2],), rank=dr.Fixed(2))


def an_epoch(net: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    """Three batches; the loss of the last."""
    for x, y in zip(X.split(8), Y.split(8), strict=True):
        loss = nn.functional.mse_loss(net(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def by_epoch(*settings: Setting) -> Callable[[dr.TrainState], Setting]:
    return lambda state: settings[state.epoch]


def test_an_epoch_begins_in_what_the_schedule_says_and_the_record_says_so() -> None:
    net = made()
    optimizer = SGD(net.parameters(), lr=0.1)
    reasons = ("because", "and so")
    schedule = by_epoch(FULL, {"0.*": LOW}, Decision({"0.*": FULL, "2.*": ADAPTOR}, reasons))
    phases = dr.Phases(net, optimizer, schedule, 3)
    spent = 0.0
    for epoch, expected in enumerate(((FULL, FULL), (LOW, FULL), (FULL, ADAPTOR))):
        before = {name: modules[0].weight.detach().double() for name, modules in switched_modules(net).items()}
        record = phases.begin(epoch)
        spent += cost_of(net)
        assert record is phases.history[-1]
        assert tuple(record.phases.values()) == tuple(dr.phases_of(net).values()) == expected
        assert (record.epoch, record.lr, record.spent) == (epoch, 0.1, pytest.approx(spent))
        assert record.ranks == {"0.weight": 2, "2.weight": 2}
        assert record.reasons == (reasons if epoch == 2 else ())
        assert record.switch_error.keys() == {change.site for change in phases.transition.changes}
        for name, error in record.switch_error.items():
            after = switched_modules(net)[name][0].weight.detach().double()
            assert error == pytest.approx(float((after - before[name]).norm() / before[name].norm()), abs=1e-6)
            if record.phases[name] is LOW:
                values, _ = record.switch_spectra[name]
                assert values == pytest.approx(torch.linalg.svdvals(before[name])[: len(values)].tolist(), abs=2e-3)
        assert record.switch_spectra.keys() == {name for name in record.switch_error if record.phases[name] is LOW}
        an_epoch(net, optimizer)
    assert [record.phase for record in phases.history] == ["FULL", "1 FULL 1 LOW", "1 FULL 1 ADAPTOR"]


def test_spectra_are_kept_of_the_last_cut_of_each_site() -> None:
    net = made()
    one = {"0.*": LOW, "2.*": FULL}
    phases = dr.Phases(net, SGD(net.parameters(), lr=0.1), by_epoch(FULL, LOW, FULL, one, FULL, LOW), 6)
    kept = []
    for epoch in range(6):
        phases.begin(epoch)
        kept.append({record.epoch: set(record.switch_spectra) for record in phases.history if record.switch_spectra})
    both, first, second = {"0.weight", "2.weight"}, {"0.weight"}, {"2.weight"}
    assert kept == [{}, {1: both}, {1: both}, {1: second, 3: first}, {1: second, 3: first}, {5: both}]


def test_an_epoch_that_is_begun_again_has_one_record() -> None:
    net = made()
    phases = dr.Phases(net, SGD(net.parameters(), lr=0.1), dr.schedules.interleave(low=1, full=1), 3)
    for epoch in (0, 1, 1, 2, 1):
        record = phases.begin(epoch)
    assert [each.epoch for each in phases.history] == [0, 1]
    assert record.phase == "FULL"
    assert record.spent == pytest.approx(phases.history[0].spent + 1)


def test_a_loop_notes_its_figures_in_the_record() -> None:
    net = made()
    optimizer = SGD(net.parameters(), lr=0.1)
    phases = dr.Phases(net, optimizer, dr.schedules.warm_up(1), 2)
    for epoch in range(2):
        begun = phases.begin(epoch)
        noted = phases.note(loss=an_epoch(net, optimizer), gradient_norm=epoch)
        assert begun.loss is None
        assert noted is phases.history[-1]
        assert noted["gradient_norm"] == epoch
    assert [record.phase for record in phases.history] == ["FULL", "LOW"]
    assert phases.history[0].loss is not None


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_run_goes_on_from_its_state_bit_by_bit(stop: int) -> None:
    """The state goes through JSON and torch's own file, as Lightning's and the Trainer's checkpoints do."""

    def begin(net: nn.Module) -> tuple[dr.Phases, torch.optim.Optimizer]:
        optimizer = AdamW(net.parameters(), lr=0.01, weight_decay=0.1)
        schedule = dr.schedules.FullBetween(1, 3)
        return dr.Phases(
            net, optimizer, schedule, 4, steps=3, landing=True, rewarm=4, decay=dr.Decay.PRODUCT
        ), optimizer

    def train(net: nn.Module, phases: dr.Phases, optimizer: torch.optim.Optimizer, epochs: range) -> None:
        for epoch in epochs:
            phases.begin(epoch)
            phases.note(loss=an_epoch(net, optimizer))

    whole = made()
    expected, optimizer = begin(whole)
    train(whole, expected, optimizer, range(4))

    net = made()
    phases, optimizer = begin(net)
    train(net, phases, optimizer, range(stop))
    state, weights, moments = copy.deepcopy((phases.state_dict(), net.state_dict(), optimizer.state_dict()))
    state["history"] = json.loads(json.dumps(state["history"]))

    again = made()
    dr.resume_phases_(again, state)
    again.load_state_dict(weights)
    phases, optimizer = begin(again)
    optimizer.load_state_dict(moments)
    phases.load_state_dict(state)
    train(again, phases, optimizer, range(stop, 4))
    assert all(map(torch.equal, again.state_dict().values(), whole.state_dict().values()))
    timed = [record.with_figures(switch_seconds=0.0) for record in phases.history]
    assert timed == [record.with_figures(switch_seconds=0.0) for record in expected.history]


def test_the_state_of_an_earlier_version_goes_on() -> None:
    """As it was written when records were dicts, to which a loop had added its loss."""
    begun = {"epoch": 0, "phase": "1 FULL 1 LOW", "phases": {"0.weight": "LOW", "2.weight": "FULL"}, "lr": 0.1}
    begun |= {"ranks": {"0.weight": 3, "2.weight": 2}, "reasons": ["so"], "switch_error": {}, "spent": 0.9, "loss": 2.0}
    state = {"history": [begun], "rewarm": [4, 2], "landing": None}
    net = made()
    dr.resume_phases_(net, state)
    assert dr.phases_of(net) == {"0.weight": LOW, "2.weight": FULL}
    assert switched_modules(net)["0.weight"][0].rank == 3
    phases = dr.Phases(net, SGD(net.parameters(), lr=0.1), dr.schedules.always(LOW), 2, rewarm=4)
    phases.load_state_dict(state)
    assert phases.history == [EpochRecord.from_json(begun)]
    assert phases.hooks_state() == {"step": 0, "rewarm": [4, 2], "landing": None, "starts": {}, "waits": False}
    assert phases.begin(1).spent == pytest.approx(0.9 + cost_of(net))


def test_random_factors_are_those_that_training_starts_with_only() -> None:
    for schedule, random in ((by_epoch(LOW, FULL, LOW), True), (by_epoch(FULL, LOW, LOW), False)):
        net = made()
        weight = net.get_submodule("0").weight.detach().clone()
        phases = dr.Phases(net, SGD(net.parameters(), lr=0.0), schedule, 3, random_init=True)
        phases.begin(0)
        if not random:
            phases.begin(1)
        U, S, Vh = torch.linalg.svd(weight)
        best = U[:, :2] @ S[:2].diag() @ Vh[:2]
        assert torch.allclose(net.get_submodule("0").weight, best, atol=1e-5) != random


def test_removing_takes_every_hook_off_the_optimizer() -> None:
    net = made()
    optimizer = SGD(net.parameters(), lr=0.1, weight_decay=0.1)
    schedule = dr.schedules.interleave(low=1, full=1)
    phases = dr.Phases(net, optimizer, schedule, 4, steps=3, landing=True, rewarm=9, decay=dr.Decay.PRODUCT)
    for epoch in range(2):
        phases.begin(epoch)
        an_epoch(net, optimizer)
    hooks = (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)
    assert all(hooks)
    phases.remove()
    assert not any(hooks)


def test_choices_are_given_by_name_or_as_one_value_or_both() -> None:
    def settings(**given: Any) -> PhaseSettings:
        net = made()
        return dr.Phases(net, SGD(net.parameters(), lr=0.1), dr.schedules.always(LOW), 1, **given).settings

    assert settings() == PhaseSettings()
    assert settings(rewarm=3) == PhaseSettings(rewarm=3)
    one = PhaseSettings(rewarm=3, carry=dr.Carry.RESET)
    assert settings(settings=one) == one
    assert settings(settings=one, rewarm=0) == PhaseSettings(carry=dr.Carry.RESET)
    for unknown in ("amp", "rewarmed"):  # the first is for fit, which runs the model itself
        with pytest.raises(TypeError, match=unknown):
            settings(**{unknown: 1})


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"epochs": 0}, "a run cannot have 0 epochs: give a whole number of 1 or more"),
        ({"epochs": 2.5}, r"a run cannot have 2\.5 epochs"),
        ({"steps": 0}, "an epoch cannot have 0 steps: give a whole number of 1 or more, or leave it out"),
        ({"schedule": LOW}, r"<Phase\.LOW: 1> is no schedule: give one such as schedules\.always\(Phase\.LOW\)"),
        ({"schedule": Decision}, "Decision'> is no schedule"),
        ({"schedule": dr.schedules.auto}, r"auto makes a schedule: call it, schedules\.auto\(\.\.\.\)"),
        ({"net": nn.Linear(4, 4)}, "Linear has no factors that move: give what transform made of it"),
        ({"carry": "reset"}, "'reset' does not say what becomes of optimizer state"),
        ({"decay": "x"}, "'x' does not say what decays"),
        ({"rewarm": 2.5}, r"a learning rate cannot re-warm over 2\.5 steps; give 0 or more"),
        ({"landing": "soft"}, "landing is 'soft': give True or False"),
    ],
)
def test_what_cannot_be_is_refused_before_training(given: dict[str, Any], sentence: str) -> None:
    net = made()
    optimizer = SGD(net.parameters(), lr=0.1)
    with pytest.raises(dr.DynrankError, match=sentence):
        dr.Phases(**{"net": net, "optimizer": optimizer, "schedule": dr.schedules.always(LOW), "epochs": 3} | given)
    assert not optimizer._optimizer_step_pre_hooks


def test_epochs_and_states_of_another_run_are_refused() -> None:
    net = made()
    phases = dr.Phases(net, SGD(net.parameters(), lr=0.1), dr.schedules.always(LOW), 2)
    with pytest.raises(
        dr.ScheduleError, match=r"^no epoch has begun whose figures these are: call begin\(epoch\) first$"
    ):
        phases.note(loss=1.0)
    for epoch in (2, -1, 0.5):
        with pytest.raises(dr.ScheduleError, match="is none of a run of 2 epochs, which count from 0 to 1"):
            phases.begin(epoch)  # type: ignore[arg-type]
    record = {"epoch": 0, "phases": {"0.weight": "LOW"}, "lr": 0.1, "spent": 1.0}
    odd = [record | each for each in ({"epoch": "0"}, {"lr": None}, {"spent": -1}, {"ranks": [3]}, {"phases": ["LOW"]})]
    states: list[Any] = [{}, [], None, {"history": [3]}, {"history": [{"epoch": 0}]}, {"history": 3}]
    states += [{"history": [each]} for each in odd]
    states += [{"history": [record], "rates": rates} for rates in (3, ["x"], [0.1])]
    for state in states:
        for load in (phases.load_state_dict, lambda state: dr.resume_phases_(net, state)):
            with pytest.raises(
                dr.StoreError, match=r"holds no history of phases: give what Phases\.state_dict\(\) gave"
            ):
                load(state)
    assert set(dr.phases_of(net).values()) == {FULL}


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"step": "3"}, "the state holds no history of phases"),
        ({"rewarm": [4, None]}, "the state holds no history of phases"),
        ({"rewarm": [4, 1, 1]}, "the state is of 2 optimizers, and Phases has 1: give the same ones"),
        ({"landing": {"left": {"0.weight": 3}}}, "the state of the landing is of another net, or damaged"),
        ({"landing": {"left": {}, "bases": {"other": (torch.ones(1),)}}}, "the state of the landing is of another net"),
    ],
)
def test_where_steps_stand_in_a_state_of_something_else_is_refused(more: dict[str, Any], sentence: str) -> None:
    net = made()
    phases = dr.Phases(net, SGD(net.parameters(), lr=0.1), dr.schedules.always(FULL), 2, rewarm=4, landing=True)
    with pytest.raises(dr.StoreError, match=f"^{sentence}"):
        phases.load_state_dict(phases.state_dict() | more)


class _Drawing:
    """A schedule that reads spectra and draws at random: it says something else in every process."""

    def __init__(self, seed: int) -> None:
        self._draw = Random(seed)
        self.calls = 0

    def __call__(self, state: dr.TrainState) -> Setting:
        self.calls += 1
        assert all(state.spectra[name] for name in state.sites)
        return Decision({name: self._draw.choice([FULL, LOW]) for name in state.sites}, (f"{self._draw.random()}",))


def _in_two(rank: int) -> dict[str, Any]:
    said: dict[str, Any] = {}

    def refused(name: str, net: nn.Module, lr: float = 0.1, **given: Any) -> None:
        optimizer = SGD(net.parameters(), lr=lr)
        with pytest.raises(dr.DynrankError) as error:
            dr.Phases(net, optimizer, dr.schedules.always(LOW), **given)
        said[name] = str(error.value)

    refused("bare", made(), steps=4)
    refused("clock", DistributedDataParallel(made()), steps=20 + rank)
    refused("optimizer", DistributedDataParallel(made()), lr=0.1 + rank, steps=20)
    other = DistributedDataParallel(made())
    with torch.no_grad():
        other.module.get_parameter("0.bias")[3] += rank * 1e-6
    refused("model", other, steps=20)

    torch.manual_seed(rank)
    wrapper, schedule = DistributedDataParallel(made()), _Drawing(rank)
    optimizer = AdamW(wrapper.parameters(), lr=1e-2)
    settings = PhaseSettings(random_init=True, landing=True, spectra=True)
    phases = dr.Phases(wrapper, optimizer, schedule, 3, steps=6, settings=settings)
    for _ in range(18):
        nn.functional.mse_loss(wrapper(X[rank::2]), Y[rank::2]).backward()
        optimizer.step()
        optimizer.zero_grad()
    records = [record.to_json() for record in phases.history]
    for record in records:
        del record["switch_seconds"]
    said |= {"records": records, "calls": schedule.calls, "weights": digest_of(wrapper.state_dict())}
    said["spent"] = _error(lambda: phases.begin(1 + rank))
    return said


def _error(do: Callable[[], object]) -> str:
    try:
        do()
    except dr.DynrankError as error:
        return str(error)
    return ""


def test_two_processes_begin_with_the_same_and_follow_the_schedule_of_the_first() -> None:
    first, second = in_processes(_in_two)
    assert "wrapped in nothing that averages their gradients" in first["bare"]
    for name, what in (("clock", "the clock of the run"), ("optimizer", "lr of parameter group"), ("model", "0.bias")):
        assert first[name] == second[name]
        assert first[name].startswith(what)
        assert "in process 1 of 2 it is another" in first[name]
    assert first["records"] == second["records"]
    assert len(first["records"]) == 3
    assert first["weights"] == second["weights"]
    assert (first["calls"] > 0, second["calls"]) == (True, 0)
    assert first["spent"].startswith("the tick that begins is not the same")
