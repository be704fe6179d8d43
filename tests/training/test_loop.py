"""The training loop: the schedule's phases at their epochs, a history that says what happened, and sentences."""

from __future__ import annotations

import copy
import functools
import importlib
import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import MultiStepLR, ReduceLROnPlateau
from torch.utils.data import DataLoader, TensorDataset

import dynrank_fx as dr
from dynrank_fx.rewrite import switched_modules
from dynrank_fx.schedules import Schedule
from dynrank_fx.training import Run, Settings, Task, Watcher, fit
from dynrank_fx.training.phases import phase_label

FULL, LOW = dr.Phase.FULL, dr.Phase.LOW
EAGER = Settings(epochs=3, compile=False)
always = dr.schedules.always
ALWAYS_LOW = always(LOW)
X = torch.randn(20, 12, generator=torch.Generator().manual_seed(1))
Y = X.roll(3, 1)[:, :8].contiguous()


def made(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(12, 16), nn.Dropout(0.2), nn.Tanh(), nn.Linear(16, 8))
    return dr.transform(model, (X[:2],), rank=dr.Fixed(2))


def loss(output: Tensor, batch: Sequence[Tensor]) -> Tensor:
    return F.mse_loss(output, batch[1])


def metric(output: Tensor, batch: Sequence[Tensor]) -> Tensor:
    return (output.sign() == batch[1].sign()).float().mean()


TASK = Task(
    train_data=[(X[:8], Y[:8]), (X[8:16], Y[8:16])], loss=loss, inputs=lambda batch: ((batch[0],), {}), metric=metric
)


def a_run(net: nn.Module, schedule: Schedule = ALWAYS_LOW, lr: float = 0.05) -> Run:
    return Run(net, SGD(net.parameters(), lr=lr, momentum=0.9), schedule)


@dataclass
class Spy(Watcher):
    """Notes what it is told."""

    told: list[Any] = field(default_factory=list)

    def epoch_started(self, run: Run, transition: dr.Transition) -> None:
        self.told.append(("started", run.epoch, phase_label(run.net), len(transition.changes)))

    def step_done(self, run: Run, loss: Tensor, metric: Any) -> None:
        self.told.append(("step", run.step, float(loss)))

    def epoch_done(self, run: Run, record: Any) -> None:
        self.told.append(("done", record.epoch))


def refusal(run: Callable[[], Any]) -> str:
    with pytest.raises(dr.DynrankError) as caught:
        run()
    return str(caught.value)


# Schedules


@pytest.mark.parametrize(
    ("schedule", "epochs", "expected"),
    [
        (always(FULL), 3, "FFF"),
        (always(LOW), 3, "LLL"),
        (dr.schedules.interleave(low=2, full=1), 7, "LLFLLFL"),
        (dr.schedules.aligned(10, [5]), 10, "LLLLFFLLLL"),
        (dr.schedules.join([always(FULL), dr.schedules.interleave(low=1, full=1)], [2]), 6, "FFLFLF"),
        (lambda state: LOW if state.epoch < (state.epochs or 0) - 1 else FULL, 3, "LLF"),
    ],
    ids=["full", "low", "interleave", "aligned", "join", "a function"],
)
def test_every_epoch_is_in_the_phase_the_schedule_says(schedule: Schedule, epochs: int, expected: str) -> None:
    run = a_run(made(), schedule)
    assert fit(run, TASK, replace(EAGER, epochs=epochs))
    assert "".join(record.phase[0] for record in run.history) == expected
    assert [record.epoch for record in run.history] == list(range(epochs))
    assert all({p.name for p in record.phases.values()} == {record.phase} for record in run.history)
    switches = [bool(record.switch_error) for record in run.history]
    assert switches == [a != b for a, b in zip("F" + expected, expected, strict=False)]
    assert phase_label(run.net)[0] == expected[-1]


def test_a_schedule_may_set_sites_apart() -> None:
    run = a_run(made(), lambda state: {"0.*": LOW} if state.epoch == 1 else {})
    watcher = Spy()
    fit(run, TASK, replace(EAGER, epochs=2), watcher=watcher)
    assert [record.phase for record in run.history] == ["FULL", "1 FULL 1 LOW"]
    assert run.history[1].phases == {"0.weight": LOW, "3.weight": FULL}
    assert list(run.history[1].switch_error) == ["0.weight"]
    assert [entry for entry in watcher.told if entry[0] == "started"] == [
        ("started", 0, "FULL", 0),
        ("started", 1, "1 FULL 1 LOW", 1),
    ]


def test_a_schedule_sees_the_state_of_the_run_and_the_true_spectra() -> None:
    net = made()
    seen = []

    def schedule(state: dr.TrainState) -> dr.Phase:
        for name, (module, *_) in switched_modules(net).items():
            dense = module.weight.detach().double()
            expected = torch.linalg.svdvals(dense)[: len(state.spectra[name])]
            assert torch.allclose(torch.tensor(state.spectra[name], dtype=torch.float64), expected, rtol=1e-5)
            assert len(state.spectra[name]) == (2 if dr.phases_of(net)[name] is LOW else min(dense.shape))
            assert state.spectra[name] == state.spectra[name]
        assert set(state.spectra) == {"0.weight", "3.weight"}
        assert len(state.spectra) == 2
        seen.append((state.epoch, state.epochs, state.lr, state.spent))
        return LOW if state.epoch == 1 else FULL

    optimizer = SGD(net.parameters(), lr=0.4)
    run = Run(net, optimizer, schedule, MultiStepLR(optimizer, [1, 2], 0.5))
    fit(run, TASK, EAGER)
    low = cost(net)
    assert seen == [(0, 3, 0.4, 0.0), (1, 3, 0.2, 1.0), (2, 3, 0.1, 1 + low)]
    assert [record.spent for record in run.history] == [1.0, 1 + low, 2 + low]


def cost(net: nn.Module) -> float:
    """The FLOPs of the model below with both linears at rank 2, over those of the dense one."""
    return (2 * (12 + 16) + 2 * (16 + 8)) / (12 * 16 + 16 * 8)


# The history


def test_the_history_says_what_happened() -> None:
    net = made()
    run = a_run(net, dr.schedules.interleave(low=1, full=1))
    watcher = Spy()
    task = replace(TASK, eval_data=[(X[16:19], Y[16:19]), (X[19:], Y[19:])])
    assert fit(run, task, replace(EAGER, epochs=2), watcher=watcher)
    for epoch, record in enumerate(run.history):
        assert [key for key in record.to_json() if key != "truncated"] == [
            "epoch",
            "phase",
            "phases",
            "ranks",
            "lr",
            "reasons",
            "epochs_to_cut",
            "switch_error",
            "switch_spectra",
            "switch_seconds",
            "spent",
            "seconds",
            "step_seconds",
            "steps",
            "loss",
            "metric",
            "eval_loss",
            "eval_metric",
            "memory",
            "effective_rank",
            "stable_rank",
        ]
        steps = watcher.told[4 * epoch + 1 : 4 * epoch + 3]
        assert record.loss == pytest.approx(statistics.fmean(step[2] for step in steps))
        assert record.seconds > 0
        assert record.step_seconds > 0
    assert [entry[:2] for entry in watcher.told] == [
        *(("started", 0), ("step", 1), ("step", 2), ("done", 0)),
        *(("started", 1), ("step", 1), ("step", 2), ("done", 1)),
    ]
    last = run.history[-1]
    with torch.no_grad():
        output = net.eval()(X[16:])
    assert last.eval_loss == pytest.approx(F.mse_loss(output, Y[16:]).item())  # weighted by size
    assert last.eval_metric == pytest.approx(metric(output, (X[16:], Y[16:])).item())
    for name, (module, *_) in switched_modules(net).items():
        s = torch.linalg.svdvals(module.weight.detach().double())
        p = s / s.sum()
        assert last.effective_rank[name] == pytest.approx(math.exp(-(p * p.log()).sum()), rel=1e-4)
        assert last.stable_rank[name] == pytest.approx(float(s.square().sum() / s[0] ** 2), rel=1e-4)
    errors = run.history[0].switch_error
    assert all(0.1 < error < 1 for error in errors.values())
    assert all(error == 0 for error in last.switch_error.values())


def test_without_evaluation_metric_or_spectra_the_history_leaves_them_out() -> None:
    run = a_run(made())
    fit(run, replace(TASK, metric=None), replace(EAGER, epochs=2, spectra=False))
    record, _ = run.history
    assert record.metric is None
    assert not {"eval_loss", "eval_metric", "effective_rank", "stable_rank"} & set(record.to_json())


def test_training_is_that_of_a_plain_loop() -> None:
    """Against the user's own loop of design.md section 4, with the same random numbers."""
    run = a_run(made(), dr.schedules.interleave(low=1, full=1))
    data = DataLoader(TensorDataset(X, Y), 6, shuffle=True)
    torch.manual_seed(5)
    fit(run, replace(TASK, train_data=data), EAGER)

    net = made()
    optimizer = SGD(net.parameters(), lr=0.05, momentum=0.9)
    torch.manual_seed(5)
    for epoch in range(3):
        dr.enter_(net, run.schedule(dr.TrainState(epoch=epoch)), optimizer)
        net.train()
        for batch in data:
            loss(net(batch[0]), batch).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert all(map(torch.equal, run.net.state_dict().values(), net.state_dict().values()))


def test_it_learns() -> None:
    run = a_run(made(), dr.schedules.interleave(low=2, full=2), lr=0.3)
    fit(run, TASK, replace(EAGER, epochs=40))
    assert run.history[-1].loss < 0.5 * run.history[0].loss


# Saving and stopping


def test_it_saves_after_every_epoch_and_every_so_many_steps() -> None:
    saved: list[Any] = []
    run = a_run(made())
    task = replace(TASK, train_data=[(X[i : i + 4], Y[i : i + 4]) for i in range(0, 20, 4)])
    fit(run, task, replace(EAGER, epochs=2, checkpoint_steps=2), save=lambda r: saved.append((r.epoch, r.step)))
    assert saved == [(0, 2), (0, 4), (1, 0), (1, 2), (1, 4), (2, 0)]


@pytest.mark.parametrize("stop", range(1, 5))
def test_a_stop_is_between_two_steps_and_saves(stop: int) -> None:
    saved: list[Any] = []
    run, watcher = a_run(made()), Spy()
    steps = lambda: sum(entry[0] == "step" for entry in watcher.told)  # noqa: E731
    done = fit(
        run,
        TASK,
        EAGER,
        save=lambda r: saved.append((r.epoch, r.step)),
        watcher=watcher,
        should_stop=lambda: steps() == stop,
    )
    assert not done
    assert saved[-1] == (run.epoch, run.step) == ((stop - 1) // 2, (stop - 1) % 2 + 1)
    assert run.record.seconds > 0
    assert fit(run, TASK, EAGER, watcher=watcher)
    assert [record.epoch for record in run.history] == [0, 1, 2]
    assert steps() == 6


# The learning rate


def test_a_switch_rewarms_the_learning_rate_but_the_first_phase_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    module = importlib.import_module("torch.optim.sgd")
    plain = module.sgd
    monkeypatch.setattr(module, "sgd", lambda *a, **k: (rates.append(k["lr"]), plain(*a, **k)))
    net = made()
    schedule = dr.schedules.join([always(LOW), always(FULL), always(LOW)], [2, 3])
    run = Run(net, SGD(net.parameters(), lr=0.1), schedule)
    assert fit(run, TASK, replace(EAGER, epochs=5, rewarm=4))
    unswitched = [0.1] * 4
    cut_short, begun_anew = [0.025, 0.05], [0.025, 0.05, 0.075, 0.1]  # the scalings do not multiply
    assert rates == pytest.approx([*unswitched, *cut_short, *begun_anew])
    assert [record.lr for record in run.history] == [0.1] * 5


def test_reduce_on_plateau_is_told_the_held_out_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[float] = []
    step = ReduceLROnPlateau.step
    monkeypatch.setattr(ReduceLROnPlateau, "step", lambda self, value: (told.append(value), step(self, value)))
    for eval_data in (None, [(X[16:], Y[16:])], [(torch.zeros(1, 12), None)]):
        net = made()
        optimizer = SGD(net.parameters(), lr=0.1)
        run = Run(net, optimizer, always(LOW), ReduceLROnPlateau(optimizer, patience=0, threshold=10.0))
        task = replace(
            TASK, loss=lambda o, b: o.sum() * 0 if b[1] is None else loss(o, b), eval_data=eval_data, metric=None
        )
        told.clear()
        fit(run, task, EAGER)
        assert told == [record["eval_loss" if eval_data else "loss"] for record in run.history]
        assert [record.lr for record in run.history] == pytest.approx([0.1, 0.01, 0.001])


def test_an_ordinary_scheduler_steps_once_an_epoch() -> None:
    net = made()
    optimizer = Adam(net.parameters(), lr=0.1)
    run = Run(net, optimizer, dr.schedules.interleave(low=1, full=1), MultiStepLR(optimizer, [1, 3]))
    fit(run, TASK, replace(EAGER, epochs=4))
    assert [record.lr for record in run.history] == pytest.approx([0.1, 0.01, 0.01, 0.001])


# Modes


def test_training_is_in_training_mode_whatever_was_before() -> None:
    net = made().eval()
    run = a_run(net)
    modes = []
    task = replace(TASK, loss=lambda o, b: (modes.append(net.training), loss(o, b))[1], eval_data=[(X, Y)])
    fit(run, task, replace(EAGER, epochs=2))
    assert modes == [True, True, False] * 2


def test_bfloat16_autocast_covers_model_and_loss_and_keeps_the_weights() -> None:
    dtypes = []

    def seen(output: Tensor, batch: Any) -> Tensor:
        dtypes.append((output.dtype, torch.is_autocast_enabled("cpu")))
        return loss(output.float(), batch)

    run = a_run(made(), dr.schedules.interleave(low=1, full=1))
    fit(run, replace(TASK, loss=seen, eval_data=[(X, Y)]), replace(EAGER, epochs=2, amp=torch.bfloat16))
    assert dtypes == [(torch.bfloat16, True)] * 7, "the truncated model's evaluation too"
    assert all(p.dtype == torch.float32 for p in run.net.parameters())
    assert not torch.is_autocast_enabled("cpu")


# Compiled


def test_compiled_training_is_that_of_eager_with_an_eager_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = functools.partial(torch.compile, backend="eager")
    monkeypatch.setattr(torch, "compile", lambda *a, **k: compiled(*a, **k))
    task = replace(TASK, train_data=[(X[:8], Y[:8]), (X[8:16], Y[8:16]), (X[16:], Y[16:])])
    states = []
    for settings in (EAGER, replace(EAGER, compile=True)):
        run = a_run(made(), dr.schedules.interleave(low=1, full=1))
        torch.manual_seed(7)
        fit(run, task, settings)
        states.append(run.net.state_dict())
    assert all(map(torch.equal, states[0].values(), states[1].values()))


def test_too_many_batch_shapes_to_compile_are_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = functools.partial(torch.compile, backend="eager")
    monkeypatch.setattr(torch, "compile", lambda *a, **k: compiled(*a, **k))
    task = replace(TASK, train_data=[(X[:n], Y[:n]) for n in range(2, 20)])
    assert refusal(lambda: fit(a_run(made()), task, Settings(epochs=1))) == (
        "the batches have more than 8 shapes, each of which is compiled to a graph of its own: pad them to fewer, or "
        "train without compiling"
    )


# Refusals


def diverging(at: int) -> Callable[[Tensor, Any], Tensor]:
    steps = iter(range(100))
    return lambda o, b: loss(o, b) * (float("inf") if next(steps) == at else 1.0)


@pytest.mark.parametrize("at", range(4))
def test_a_loss_that_is_not_finite_is_told_and_never_saved(at: int) -> None:
    saved: list[Any] = []

    def save(run: Run) -> None:
        assert all(bool(torch.isfinite(p).all()) for p in run.net.parameters())
        saved.append((run.epoch, run.step))

    run = a_run(made())
    message = refusal(
        lambda: fit(run, replace(TASK, loss=diverging(at)), replace(EAGER, checkpoint_steps=1), save=save)
    )
    assert message == (
        f"the training diverged in epoch {at // 2 + 1}, where the loss is not finite: lower the learning rate; "
        "what was saved is from before that"
    )
    assert saved == [(0, 1), (0, 2), (1, 0), (1, 1)][: at + at // 2]


@pytest.mark.parametrize("stopping", [True, False])
def test_a_last_step_that_overflows_the_weights_is_told_and_never_saved(stopping: bool) -> None:
    """The loss was still finite."""
    saved: list[Any] = []
    run = a_run(made(), lr=3e38)
    one = replace(TASK, train_data=[(X[:8], Y[:8])], loss=lambda o, b: 1000 * loss(o, b))
    message = refusal(lambda: fit(run, one, EAGER, save=saved.append, should_stop=lambda: stopping))
    assert message.startswith("the training diverged in epoch 1, ")
    assert saved == []


@pytest.mark.parametrize("what", ["momentum", "running_var"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_else_a_checkpoint_holds_and_is_not_finite_is_told_and_never_saved(what: str, value: float) -> None:
    """With weights and a loss that are: the next step, or an evaluation, would not be."""
    saved: list[Any] = []
    model = nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Linear(16, 8))
    model.register_buffer("mask", torch.full((4, 4), float("-inf")).triu(1))  # which is as it should be
    run = a_run(dr.transform(model, (X[:2],), rank=dr.Fixed(2)), always(FULL))

    def save(run: Run) -> None:
        saved.append(run.step)
        if what == "momentum":
            run.optimizer.state[next(run.net.parameters())]["average"] = torch.tensor([1.0, value])
        else:
            run.net.get_buffer("1.running_var")[3] = value

    message = refusal(lambda: fit(run, TASK, replace(EAGER, checkpoint_steps=1), save=save))
    name = {"momentum": "the optimizer's average of 0.weight", "running_var": "1.running_var"}[what]
    assert message.startswith(f"the training diverged in epoch 1, where {name} is not finite: lower the learning rate")
    assert saved == [1]


@pytest.mark.parametrize("what", ["0.bias", "1.running_var"])
def test_what_is_not_finite_before_the_first_step_is_told_as_that(what: str) -> None:
    model = nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Linear(16, 8))
    model.state_dict()[what][3] = torch.inf
    run = a_run(dr.transform(model, (X[:2],), rank=dr.Fixed(2)), always(FULL))
    message = refusal(lambda: fit(run, TASK, EAGER))
    assert message == f"{what} is not finite before the first step: begin with sound weights"
    assert not run.optimizer._optimizer_step_post_hooks


def test_no_batch_is_told() -> None:
    loader = DataLoader(TensorDataset(X[:5], Y[:5]), batch_size=8, drop_last=True)
    assert refusal(lambda: fit(a_run(made()), replace(TASK, train_data=loader), EAGER)) == (
        "train_data() gave no batch in epoch 1: is drop_last set on a data set smaller than one batch, or is it a "
        "generator, which gives its batches once?"
    )
    assert refusal(lambda: fit(a_run(made()), replace(TASK, eval_data=loader), EAGER)).startswith(
        "eval_data() gave no batch: "
    )


def test_data_that_gives_its_batches_once_is_told() -> None:
    class Once:
        """An iterator of which nobody can know that it does not begin anew."""

        def __init__(self) -> None:
            self.batches = iter(TASK.train_data)

        def __iter__(self) -> Iterator[Any]:
            return self.batches

    assert "no batch in epoch 2" in refusal(lambda: fit(a_run(made()), replace(TASK, train_data=Once()), EAGER))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_batch_that_does_not_fit_the_model_is_told(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    eager = functools.partial(torch.compile, backend="eager")
    monkeypatch.setattr(torch, "compile", lambda *a, **k: eager(*a, **k))
    settings = replace(EAGER, compile=compiled)
    message = refusal(lambda: fit(a_run(made()), replace(TASK, train_data=[(X[:, :5], Y)]), settings))
    assert message.startswith("the model does not accept a batch of the data (torch.float32 (20, 5)): RuntimeError: ")
    assert "\n" not in message
    two = replace(TASK, inputs=lambda batch: (tuple(batch), {}))
    assert "TypeError: " in refusal(lambda: fit(a_run(made()), two, settings))
    good = replace(TASK, eval_data=[(X[:, :5], Y)])
    assert "(20, 5)" in refusal(lambda: fit(a_run(made()), good, settings))


def test_an_error_that_is_not_the_batchs_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> None:
        raise ValueError("a compiler's own")

    compiled = functools.partial(torch.compile, backend=broken)
    monkeypatch.setattr(torch, "compile", lambda *a, **k: compiled(*a, **k))
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="a compiler's own"):
        fit(a_run(made()), TASK, Settings(epochs=1))


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        (lambda o, b: (o - b[1]).square().mean(1), "a tensor of float32 and shape (8,)"),
        (lambda o, b: loss(o.detach(), b), "one without a gradient"),
    ],
    ids=["one number per example", "detached"],
)
def test_a_loss_that_cannot_be_trained_on_is_told(wrong: Any, what: str) -> None:
    assert refusal(lambda: fit(a_run(made()), replace(TASK, loss=wrong), EAGER)) == (
        f"the loss must be one number that depends on the model's output: loss() gave {what}"
    )


def test_a_loss_of_nothing_that_trains_is_told() -> None:
    lost = replace(TASK, loss=lambda output, batch: torch.ones((), requires_grad=True))
    assert refusal(lambda: fit(a_run(made()), lost, EAGER)).startswith("the loss depends on nothing that the optimizer")


def test_held_out_data_may_be_one_tensor() -> None:
    run = a_run(made())
    task = replace(TASK, train_data=[X[:4]], eval_data=X[:, None], inputs=lambda batch: ((batch,), {}), metric=None)
    fit(run, replace(task, loss=lambda output, batch: output.square().sum()), EAGER)
    assert run.history[-1].eval_loss is not None


def test_a_site_that_the_optimizer_does_not_train_has_to_be_frozen_and_stays_as_it_is() -> None:
    net = made()
    left_out = copy.deepcopy(net.get_submodule("3"))
    run = Run(
        net, SGD(net.get_submodule("0").parameters(), lr=0.1), dr.schedules.join([always(FULL), always(LOW)], [2])
    )
    with pytest.raises(dr.TransitionError, match=r"^3\.weight trains, and no optimizer that was given holds it"):
        fit(run, TASK, replace(EAGER, epochs=2))
    net.get_parameter("3.weight").requires_grad_(False)  # its bias gets gradients that no step uses
    fit(run, TASK, replace(EAGER, epochs=2))
    assert torch.equal(net.get_parameter("3.weight"), left_out.weight)
    fit(run, TASK, replace(EAGER, epochs=3))
    assert run.history[-1].phase == "LOW"


class Branching(nn.Module):
    """Its own code branches on data, so that only its parts are graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Sequential(nn.Linear(12, 16), nn.Tanh()), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(x if float(x.detach().sum()) < 1e9 else -x)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo's own
def test_a_net_whose_parts_alone_are_captured_trains_compiled_too(monkeypatch):
    # The real Dynamo, which would refuse such a net as one graph, without the C++ compiler.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    net = dr.transform(Branching(), (X[:2],), rank=dr.Fixed(2))
    run = a_run(net, dr.schedules.interleave(low=1, full=1))
    assert fit(run, TASK, replace(EAGER, epochs=4, compile=True))
    assert run.history[-1].loss < run.history[0].loss


def whole(net: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in net.parameters()]


def plain(model: nn.Module, sizes: Sequence[int], clip: float | None = None) -> list[Tensor]:
    """One epoch by hand: a step for each of these numbers of batches of 4."""
    optimizer = SGD(model.parameters(), lr=0.1)
    batches = iter(zip(X.split(4), Y.split(4), strict=True))
    for size in sizes:
        losses = [F.mse_loss(model(x), y) for x, y in itertools.islice(batches, size)]
        torch.stack(losses).mean().backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    return whole(model)


def no_dropout() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8))


@pytest.mark.parametrize(
    ("settings", "sizes"),
    [({"accumulate": 2}, (2, 2, 1)), ({"accumulate": 9}, (5,)), ({"clip": 0.05}, (1,) * 5), ({}, (1,) * 5)],
)
def test_batches_add_up_to_the_mean_of_a_step_and_are_clipped(settings: dict[str, Any], sizes: Sequence[int]) -> None:
    net = dr.transform(no_dropout(), (X[:2],), rank=dr.Fixed(2))
    data = list(zip(X.split(4), Y.split(4), strict=True))
    task = Task(data, lambda output, batch: F.mse_loss(output, batch[1]), lambda batch: ((batch[0],), {}))
    run = Run(net, SGD(net.parameters(), lr=0.1), always(FULL))
    assert fit(run, task, Settings(1, compile=False, **settings))
    assert sum(record.steps or 0 for record in run.history) == 5
    for ours, theirs in zip(whole(net), plain(no_dropout(), sizes, settings.get("clip")), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_run_is_stopped_and_saved_between_two_steps_of_the_optimizer() -> None:
    net = dr.transform(no_dropout(), (X[:2],), rank=dr.Fixed(2))
    data = list(zip(X.split(4), Y.split(4), strict=True))
    task = Task(data, lambda output, batch: F.mse_loss(output, batch[1]), lambda batch: ((batch[0],), {}))
    run, saved = Run(net, SGD(net.parameters(), lr=0.1), always(FULL)), []
    settings = Settings(2, compile=False, accumulate=2, checkpoint_steps=1)
    assert fit(run, task, settings, save=lambda r: saved.append(r.step))
    assert saved == [2, 4, 5, 0] * 2
    again = Run(net, SGD(net.parameters(), lr=0.1), always(FULL))
    assert not fit(again, task, settings, should_stop=lambda: again.step > 0)
    assert again.step == 2


def test_an_overflow_in_float16_takes_no_step_and_lowers_the_scale() -> None:
    net = dr.transform(no_dropout(), (X[:2],), rank=dr.Fixed(2))
    before = whole(net)
    scale = 1e7  # over what float16 holds, once the loss is scaled
    task = Task(
        [(X, Y)], lambda output, batch: scale * F.mse_loss(output.float(), batch[1]), lambda batch: ((batch[0],), {})
    )
    run = Run(net, SGD(net.parameters(), lr=1e-9), always(FULL))
    assert fit(run, task, Settings(1, compile=False, amp=torch.float16))
    assert all(torch.equal(a, b) for a, b in zip(before, whole(net), strict=True))
    assert run.scaler is not None
    assert run.scaler.get_scale() == 2.0**15


def test_a_landing_is_done_in_time_where_steps_overflow() -> None:
    net = dr.transform(no_dropout(), (X[:2],), rank=dr.Fixed(2))
    data = list(zip(X.split(4), Y.split(4), strict=True))
    task = Task(data, lambda output, batch: 1e7 * F.mse_loss(output.float(), batch[1]), lambda batch: ((batch[0],), {}))
    run = Run(net, SGD(net.parameters(), lr=1e-9), dr.schedules.warm_up(2))
    assert fit(run, task, Settings(3, compile=False, amp=torch.float16, landing=True))
    assert run.scaler is not None
    assert run.scaler.get_scale() < 2.0**8, "it has overflowed in most of the steps before the cut"
    assert 0 < max(run.history[2].switch_error.values()) < 1e-5


# In steps


class Endless:
    """Batches without an end, and without a length."""

    def __iter__(self) -> Iterator[Sequence[Tensor]]:
        while True:
            yield from TASK.train_data


def test_steps_in_place_of_epochs_are_those_of_a_plain_loop() -> None:
    """27 steps are 14 ticks: a tick may end within a pass over the data, and the last one is shorter."""
    run = a_run(made(), dr.schedules.interleave(low=3, full=2))
    torch.manual_seed(5)
    assert fit(run, replace(TASK, train_data=Endless()), replace(EAGER, epochs=None, steps=27, landing=True))
    assert [record.step for record in run.history] == list(range(0, 27, 2))
    assert run.history[-1].steps == 1

    net = made()
    optimizer = SGD(net.parameters(), lr=0.05, momentum=0.9)
    phases = dr.Phases(net, optimizer, run.schedule, steps=27, landing=True)
    torch.manual_seed(5)
    for x, y in itertools.islice(Endless(), 27):
        optimizer.zero_grad()
        loss(net(x), (x, y)).backward()
        optimizer.step()
    assert [record.phases for record in phases.history] == [record.phases for record in run.history]
    assert all(map(torch.equal, net.state_dict().values(), run.net.state_dict().values()))


def test_few_epochs_are_divided_for_a_schedule_that_does_not_count_them() -> None:
    """Three epochs of five steps, each of them a tick: evaluated, and the rate stepped, once an epoch."""

    class InTurn:
        within_epochs = True

        def __call__(self, state: dr.TrainState) -> dr.Phase:
            return FULL if state.epoch % 4 > 1 else LOW

    task = replace(TASK, train_data=list(zip(X.split(4), Y.split(4), strict=True)), eval_data=[(X, Y)])
    run = a_run(made(), InTurn())
    run.lr_scheduler = MultiStepLR(run.optimizer, [1, 2], 0.5)
    torch.manual_seed(5)
    assert fit(run, task, replace(EAGER, landing=True))
    assert [record.step for record in run.history] == list(range(15))
    assert [record.lr for record in run.history] == [0.05] * 5 + [0.025] * 5 + [0.0125] * 5
    assert [record.epoch for record in run.history if record.eval_loss is not None] == [4, 9, 14]

    net = made()
    optimizer = SGD(net.parameters(), lr=0.05, momentum=0.9)
    scheduler = MultiStepLR(optimizer, [1, 2], 0.5)
    phases = dr.Phases(net, optimizer, InTurn(), 3, scheduler, steps=5, landing=True)
    torch.manual_seed(5)
    for epoch in range(3):
        phases.begin(epoch)
        for batch in task.train_data:
            optimizer.zero_grad()
            loss(net(batch[0]), batch).backward()
            optimizer.step()
        scheduler.step()
    assert [record.phases for record in phases.history] == [record.phases for record in run.history]
    assert all(map(torch.equal, net.state_dict().values(), run.net.state_dict().values()))


def test_a_plateau_is_waited_for_by_epochs_that_are_divided() -> None:
    run = a_run(made(), dr.schedules.auto())
    run.lr_scheduler = ReduceLROnPlateau(run.optimizer, patience=0, threshold=1e9)
    assert fit(run, TASK, EAGER)
    assert len(run.history) == 6
    assert run.lr_scheduler.last_epoch == 3


def test_a_run_in_whole_epochs_goes_on_in_them() -> None:
    """As one that was begun before they were divided."""
    run = a_run(made())
    assert not fit(run, TASK, EAGER, should_stop=lambda: run.epoch == 1)
    run.schedule = dr.schedules.auto()
    assert fit(run, TASK, EAGER)
    assert [record.unit for record in run.history] == ["epoch"] * 3


def test_epochs_of_a_scheduler_need_data_with_a_length() -> None:
    run = a_run(made())
    run.lr_scheduler = MultiStepLR(run.optimizer, [1], 0.5)
    with pytest.warns(dr.DynrankWarning, match='so that no epoch ends after which MultiStepLR is stepped: .* "step"'):
        fit(run, replace(TASK, train_data=Endless()), replace(EAGER, epochs=None, steps=4))
    assert run.optimizer.param_groups[0]["lr"] == 0.05


def test_data_without_a_batch_and_a_run_without_a_length_are_refused() -> None:
    nothing: list[Any] = []
    settings = replace(EAGER, epochs=None, steps=4)
    assert "train_data() gave no batch" in refusal(
        lambda: fit(a_run(made()), replace(TASK, train_data=nothing), settings)
    )
    assert "needs an end" in refusal(lambda: fit(a_run(made()), TASK, replace(EAGER, epochs=None)))
