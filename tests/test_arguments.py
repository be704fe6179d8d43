"""Every public name on malformed values: one sentence of ours, and nothing half-changed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dynrank_fx as dr
from dynrank_fx import schedules

NAN, INF = math.nan, math.inf
POOL: dict[str, Any] = {
    "None": None,
    "text": "junk",
    "empty text": "",
    "bytes": b"junk",
    "nan": NAN,
    "inf": INF,
    "-1": -1,
    "0": 0,
    "half": 0.5,
    "1.5": 1.5,
    "True": True,
    "huge": 10**30,
    "list": [],
    "dict": {},
    "a list of text": ["junk"],
    "a list of None": [None],
    "object": object(),
    "class": nn.Linear,
    "function": lambda *args: None,
    "tensor": torch.tensor(NAN),
    "phase": dr.Phase.LOW,
}

KINDS: dict[str, set[str]] = {  # which of these a kind of argument may be
    "none": set(),
    "optional": {"None"},
    "flag": {"True"},
    "share": {"half"},
    "optional share": {"half", "None"},
    "above zero": {"half", "1.5", "huge"},
    "from zero": {"half", "1.5", "huge", "0"},
    "count from zero": {"0", "huge"},
    "count": {"huge"},
    "optional count": {"huge", "None"},
    "length": set(),
    "optional length": {"None"},
    "phase": {"phase", "0"},
    "shapes": {"None", "list", "dict", "a list of text", "a list of None"},
    "share or none": {"half", "0"},
    "names": {"list", "a list of text", "None"},
    "texts": {"list", "a list of text", "text", "empty text"},
    "several": {"list"},
    "optimizers": {"None", "list"},
    "mapping": {"dict"},
    "optional mapping": {"None", "dict"},
    "call": {"function", "class"},
    "path": {"text"},
    "setting": {"phase", "dict", "0"},
}


def a_net() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12))
    return dr.transform(model, (torch.ones(2, 12),), rank=dr.Fixed(3))


X = (torch.ones(2, 12),)
NET = a_net()
MODEL = nn.Sequential(nn.Linear(12, 12))
OPTIMIZER = torch.optim.SGD(NET.parameters(), lr=0.1, momentum=0.9)
PLAN = dr.plan_of(NET)
FOLDER = Path("unused")

Call = tuple[Callable[..., Any], dict[str, Any], dict[str, str]]
"""What is called, with which sound arguments, and of which kind those are that are spoilt one at a time."""

CALLS: dict[str, Call] = {
    "Fixed": (dr.Fixed, {}, {"rank": "count"}),
    "Ratio": (dr.Ratio, {}, {"ratio": "share"}),
    "Energy": (dr.Energy, {}, {"share": "share"}),
    "StableRank": (dr.StableRank, {}, {"scale": "above zero"}),
    "Budget params": (dr.Budget, {}, {"params": "share"}),
    "Budget": (
        dr.Budget,
        {"params": 0.5},
        {"flops": "optional share", "latency": "optional share", "even": "flag"},
    ),
    "MaxDrop": (dr.MaxDrop, {}, {"drop": "from zero"}),
    "Override": (dr.Override, {"dense": None}, {"rank": "optional", "layout": "optional", "dense": "optional flag"}),
    "PlanOptions": (
        dr.PlanOptions,
        {},
        {
            "rank": "none",
            "include": "texts",
            "exclude": "texts",
            "overrides": "mapping",
            "multiple_of": "count",
            "conv_layout": "none",
            "share_inputs": "flag",
            "leave": "several",
            "allow_unprofitable": "flag",
        },
    ),
    "SiteTimes": (dr.SiteTimes, {"cache": None}, {"element": "none", "repeats": "count", "cache": "optional path"}),
    "StepTimes": (
        dr.StepTimes,
        {"cache": None},
        {
            "device": "none",
            "dtype": "none",
            "amp": "optional",
            "compile": "flag",
            "cache": "optional path",
            "repeats": "count",
        },
    ),
    "Plan.from_json": (dr.Plan.from_json, {}, {"text": "none"}),
    "ChannelLayout": (dr.ChannelLayout, {}, {"groups": "count"}),
    "InputLayout": (dr.InputLayout, {}, {"groups": "count"}),
    "SpatialLayout": (dr.SpatialLayout, {}, {"groups": "count"}),
    "effective_rank": (dr.effective_rank, {}, {"s": "none"}),
    "stable_rank": (dr.stable_rank, {}, {"s": "none"}),
    "make_plan": (
        dr.make_plan,
        {"net": NET, "example_inputs": X},
        {"net": "none", "options": "optional", "example_inputs": "optional", "rank": "none", "leave": "several"},
    ),
    "factorize": (dr.factorize, {"net": NET, "plan": PLAN}, {"net": "none", "plan": "none"}),
    "inline": (dr.inline, {}, {"net": "none"}),
    "plan_of": (dr.plan_of, {}, {"net": "none"}),
    "phases_of": (dr.phases_of, {}, {"net": "none"}),
    "randomize_": (dr.randomize_, {}, {"net": "none"}),
    "transform": (
        dr.transform,
        {"model": MODEL, "example_inputs": X},
        {
            "model": "none",
            "example_inputs": "optional",
            "options": "optional",
            "plan": "optional",
            "form": "none",
            "how": "optional",
            "dynamic_shapes": "shapes",
            "times": "optional",
            "allow_empty": "flag",
            "copy": "flag",
            "rank": "none",
        },
    ),
    "capture": (
        dr.capture,
        {"model": MODEL, "example_inputs": X},
        {"model": "none", "example_inputs": "optional", "how": "optional", "copy": "flag"},
    ),
    "enter_": (
        dr.enter_,
        {"net": NET, "setting": dr.Phase.FULL, "optimizer": OPTIMIZER},
        {"net": "none", "setting": "setting", "optimizer": "optimizers", "averages": "several", "carry": "none"},
    ),
    "replan_": (
        dr.replan_,
        {"net": NET, "plan": PLAN, "optimizer": OPTIMIZER},
        {"net": "none", "plan": "none", "optimizer": "optimizers", "averages": "several", "carry": "none"},
    ),
    "reranked": (
        dr.reranked,
        {"net": NET, "policy": dr.Ratio(0.25)},
        {"net": "none", "policy": "none", "ladder": "count"},
    ),
    "save_checkpoint": (
        dr.save_checkpoint,
        {"folder": FOLDER, "net": NET, "optimizer": OPTIMIZER},
        {
            "folder": "path",
            "net": "none",
            "optimizer": "optimizers",
            "phases": "optional",
            "lr_scheduler": "optimizers",
            "extra": "optional mapping",
        },
    ),
    "load_checkpoint_": (
        dr.load_checkpoint_,
        {"folder": "gone", "net": NET},
        {"folder": "none", "net": "none", "optimizer": "none", "phases": "none", "lr_scheduler": "none"},
    ),
    "save": (dr.save, {"net": NET, "folder": FOLDER}, {"net": "none", "folder": "path"}),
    "load": (
        dr.load,
        {"folder": "gone", "model": MODEL, "example_inputs": X},
        {"folder": "none", "model": "none", "example_inputs": "none"},
    ),
    "calibrate": (
        dr.calibrate,
        {"net": NET, "batches": [X]},
        {"net": "none", "batches": "none", "sites": "names", "shrink": "optional from zero"},
    ),
    "truncate": (
        dr.truncate,
        {"net": NET},
        {"net": "none", "calibration": "optional several", "rank": "optional", "sequential": "flag"},
    ),
    "recalibrate_": (
        dr.recalibrate_,
        {"module": nn.Sequential(nn.Linear(12, 12), nn.BatchNorm1d(12)), "batches": [X]},
        {"module": "none", "batches": "none", "like": "optional"},
    ),
    "recover_": (
        dr.recover_,
        {"module": MODEL, "dense": MODEL, "batches": [X], "steps": 0},
        {
            "module": "none",
            "dense": "none",
            "batches": "none",
            "steps": "count from zero",
            "loss": "optional call",
            "names": "names",
        },
    ),
    "compress": (
        dr.compress,
        {"model": MODEL, "example_inputs": X, "budget": dr.Budget(params=0.5), "calibration": [X]},
        {
            "model": "none",
            "example_inputs": "optional",
            "budget": "none",
            "calibration": "optional several",
            "options": "optional",
            "metric": "optional call",
            "recover_steps": "count from zero",
            "loss": "optional call",
            "times": "optional",
            "sequential": "flag",
            "form": "none",
            "how": "optional",
            "progress": "optional call",
        },
    ),
    "export_onnx": (
        dr.export_onnx,
        {"module": MODEL, "example_inputs": X, "path": "junk.onnx"},
        {
            "module": "none",
            "example_inputs": "none",
            "path": "path",
            "opset": "optional",
            "dynamic_shapes": "shapes",
            "dynamic": "optional mapping",
            "input_names": "texts",
            "output_names": "texts",
            "precision": "none",
            "external_data": "optional flag",
            "batch_sizes": "none",
            "more_inputs": "several",
            "providers": "optional several",
            "tolerance": "optional from zero",
            "metadata": "optional mapping",
        },
    ),
    "verify_onnx": (
        dr.verify_onnx,
        {"path": "gone.onnx", "module": MODEL, "example_inputs": X},
        {
            "path": "none",
            "module": "none",
            "example_inputs": "none",
            "batch_sizes": "none",
            "providers": "none",
            "tolerance": "none",
        },
    ),
    "Phases": (
        dr.Phases,
        {"net": NET, "optimizer": OPTIMIZER, "schedule": schedules.always(dr.Phase.FULL), "epochs": 3, "steps": 5},
        {
            "net": "none",
            "optimizer": "none",
            "schedule": "call",
            "epochs": "optional length",
            "lr_scheduler": "optional",
            "steps": "optional count",
            "every": "optional",
            "lr_every_step": "optional flag",
            "averages": "several",
            "by_itself": "flag",
            "clock": "optional",
            "resume": "optional",
            "settings": "optional",
            "carry": "none",
            "rewarm": "count from zero",
            "decay": "none",
            "factor_steps": "none",
            "random_init": "flag",
            "landing": "flag",
            "spectra": "flag",
        },
    ),
    "factor_decay_": (
        dr.factor_decay_,
        {"net": NET, "optimizer": OPTIMIZER},
        {"net": "none", "optimizer": "optimizers", "decay": "none", "decoupled": "optional flag"},
    ),
    "factor_steps_": (
        dr.factor_steps_,
        {"net": NET, "optimizer": OPTIMIZER},
        {"net": "none", "optimizer": "optimizers", "steps": "none", "decoupled": "optional flag"},
    ),
    "resume_phases_": (dr.resume_phases_, {"net": NET, "state": {"history": []}}, {"net": "none", "state": "none"}),
    "rewarm_": (dr.rewarm_, {"optimizer": OPTIMIZER, "steps": 1}, {"optimizer": "none", "steps": "count from zero"}),
    "train_state": (
        dr.train_state,
        {"net": NET, "optimizer": OPTIMIZER, "epoch": 0, "epochs": 2},
        {
            "net": "none",
            "optimizer": "none",
            "epoch": "count from zero",
            "epochs": "length",
            "lr_scheduler": "optional",
            "steps_per_epoch": "count",
            "rates": "several",
            "spent": "from zero",
        },
    ),
    "always": (schedules.always, {}, {"phase": "phase"}),
    "interleave": (schedules.interleave, {"low": 1, "full": 1}, {"low": "count from zero", "full": "count from zero"}),
    "aligned": (
        schedules.aligned,
        {"epochs": 9, "lr_milestones": [3, 6]},
        {"epochs": "length", "lr_milestones": "none", "last": "phase"},
    ),
    "auto": (
        schedules.auto,
        {},
        dict.fromkeys(("cost", "recovery", "tail", "collapse", "reserve"), "share or none"),
    ),
    "join": (
        schedules.join,
        {"schedules": [schedules.always(dr.Phase.LOW)] * 2, "boundaries": [3]},
        {"schedules": "none", "boundaries": "none"},
    ),
    "warm_up": (schedules.warm_up, {}, {"full": "count from zero"}),
    "paper_cifar10": (schedules.paper_cifar10, {}, {"last": "phase"}),
    "paper_cifar100": (schedules.paper_cifar100, {}, {"last": "phase"}),
}


def may_be(kind: str) -> set[str]:
    """Which values of the pool a kind allows; ``optional`` before a kind allows None too."""
    if kind in KINDS:
        return KINDS[kind]
    return {"None"} | KINDS[kind.removeprefix("optional ")]


ARGUMENTS = [(name, argument) for name, (_, _, kinds) in CALLS.items() for argument in kinds]


def standing() -> list[Any]:
    """All that a call might change."""
    tensors = [*NET.state_dict().items(), *MODEL.state_dict().items()]
    groups = [id(parameter) for group in OPTIMIZER.param_groups for parameter in group["params"]]
    hooks = len(OPTIMIZER._optimizer_step_post_hooks) + len(OPTIMIZER._optimizer_step_pre_hooks)
    return [[(name, tensor.tolist()) for name, tensor in tensors], groups, hooks, NET.training, dr.phases_of(NET)]


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        made = tmp_path_factory.mktemp("arguments")
        patch.chdir(made)
        yield made


def refused(call: Callable[[], object], folder: Path) -> str:
    """What is wrong with the refusal of a call, or "" for one sentence of ours that has changed nothing."""
    before = standing()
    try:
        call()
    except dr.DynrankError as told:
        wrong = "" if str(told) and "\n" not in str(told) else f"it is no sentence: {told}"
    except Exception as error:
        wrong = f"raised {error!r}"
    else:
        wrong = "accepted"
    if standing() != before or list(folder.iterdir()):
        wrong += ", and something has changed"
    return wrong


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "argument"), ARGUMENTS, ids=[f"{name}({argument})" for name, argument in ARGUMENTS])
def test_a_malformed_argument_is_one_sentence(name: str, argument: str, folder: Path) -> None:
    function, sound, kinds = CALLS[name]
    wrong = {
        value: said
        for value in POOL
        if value not in may_be(kinds[argument])
        and (said := refused(lambda: function(**{**sound, argument: POOL[value]}), folder))  # noqa: B023
    }
    assert not wrong


SWAPPED: dict[str, Callable[[], object]] = {
    "export_onnx(net, path, inputs)": lambda: dr.export_onnx(NET, "a.onnx", X),  # type: ignore[arg-type]
    "export_onnx(inputs, net, path)": lambda: dr.export_onnx(X, NET, "a.onnx"),  # type: ignore[arg-type]
    "verify_onnx(net, path, inputs)": lambda: dr.verify_onnx(NET, "a.onnx", X),  # type: ignore[arg-type]
    "transform(inputs, model)": lambda: dr.transform(X, MODEL),  # type: ignore[arg-type]
    "capture(inputs, model)": lambda: dr.capture(X, MODEL),  # type: ignore[arg-type]
    "enter_(optimizer, phase, net)": lambda: dr.enter_(OPTIMIZER, dr.Phase.LOW, NET),  # type: ignore[arg-type]
    "enter_(net, optimizer, phase)": lambda: dr.enter_(NET, OPTIMIZER, dr.Phase.LOW),  # type: ignore[arg-type]
    "Phases(optimizer, net)": lambda: dr.Phases(OPTIMIZER, NET, dr.Phase.LOW, 3),  # type: ignore[arg-type]
    "save(folder, net)": lambda: dr.save("a", NET),  # type: ignore[arg-type]
    "load(model, folder)": lambda: dr.load(MODEL, "a", X),  # type: ignore[arg-type]
    "calibrate(batches, net)": lambda: dr.calibrate([X], NET),  # type: ignore[arg-type]
    "compress(model, budget, inputs)": lambda: dr.compress(MODEL, dr.Budget(params=0.5), X),  # type: ignore[arg-type]
    "recover_(module, batches, dense)": lambda: dr.recover_(MODEL, [X], MODEL, 1),  # type: ignore[arg-type]
    "factorize(plan, net)": lambda: dr.factorize(PLAN, NET),  # type: ignore[arg-type]
    "train_state(optimizer, net)": lambda: dr.train_state(OPTIMIZER, NET, 0, 2),  # type: ignore[arg-type]
    "train_state(epochs before epoch)": lambda: dr.train_state(NET, OPTIMIZER, 3, 1),
    "a tick longer than the run": lambda: dr.Phases(NET, OPTIMIZER, schedules.auto(), steps=10, every=50),
    "a scheduler of another optimizer": lambda: dr.Phases(
        NET,
        OPTIMIZER,
        schedules.auto(),
        3,
        torch.optim.lr_scheduler.StepLR(torch.optim.SGD(MODEL.parameters(), 0.1), 1),
    ),
}


@pytest.mark.parametrize("call", SWAPPED.values(), ids=SWAPPED)
def test_arguments_in_another_order_are_one_sentence(call: Callable[[], object], folder: Path) -> None:
    assert not refused(call, folder)


def test_no_weight_is_made_that_could_not_train() -> None:
    low = a_net()
    dr.enter_(low, dr.Phase.LOW)
    with torch.inference_mode():
        with pytest.raises(dr.CaptureError, match="inference_mode"):
            dr.transform(MODEL, X)
        with pytest.raises(dr.TransitionError, match="inference_mode"):
            dr.enter_(NET, dr.Phase.LOW)
        with pytest.raises(dr.CalibrationError, match="inference_mode"):
            dr.recover_(MODEL, MODEL, [X], steps=1)
        with pytest.raises(dr.StoreError, match="inference_mode"):
            NET.load_state_dict(low.state_dict())


def test_a_state_that_is_not_finite_does_not_go_along() -> None:
    net = a_net()
    optimizer = torch.optim.Adam(net.parameters())
    net(*X).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    optimizer.state[next(iter(net.parameters()))]["exp_avg"].fill_(NAN)
    with pytest.raises(dr.TransitionError, match=r"state of 0\.weight is not finite"):
        dr.enter_(net, dr.Phase.LOW, optimizer)
    assert set(dr.phases_of(net).values()) == {dr.Phase.FULL}
    dr.enter_(net, dr.Phase.LOW, optimizer, carry=dr.Carry.RESET)
    assert set(dr.phases_of(net).values()) == {dr.Phase.LOW}


def test_phases_say_where_they_stand_and_refuse_what_is_past_their_end() -> None:
    net = a_net()
    phases = dr.Phases(net, torch.optim.SGD(net.parameters(), 0.1), schedules.always(dr.Phase.LOW), 3)
    assert repr(phases) == "Phases(epoch 0 of 3, step 0, FULL; the next decision by begin(0))"
    phases.begin(0)
    assert repr(phases) == "Phases(epoch 1 of 3, step 0, LOW; the next decision by begin(1))"
    with pytest.raises(dr.ScheduleError, match="epoch 3 is none of a run of 3 epochs"):
        phases.begin(3)
    phases.remove()


def test_phases_that_fail_to_begin_leave_no_hook() -> None:
    net = a_net()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    with pytest.raises(dr.TransitionError, match="matches no site"):
        dr.Phases(net, optimizer, lambda state: {"gone": dr.Phase.LOW}, 3, steps=2)
    assert not optimizer._optimizer_step_post_hooks
    assert not optimizer._optimizer_step_pre_hooks
    dr.Phases(net, optimizer, schedules.always(dr.Phase.LOW), 3, steps=2).remove()
