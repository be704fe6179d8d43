"""A training run on disk: one checkpoint file that holds where it stands, and its history as JSON lines."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .. import store
from ..aliases import JsonObject, StateDict
from ..errors import StoreError
from ..phases import info_of, restore_, state_of
from ..plan import Plan
from ..processes import started
from ..randomness import random_state, set_random_state
from ..schedules import EpochRecord, Schedule
from .declared import said
from .history import Log, grown, read_history, spectra_of, with_spectra
from .phases import Phases
from .sharding import gathered
from .state_tree import flatten, unflatten


@dataclass
class Run:
    """A training run and where it stands: ``step`` batches into ``epoch``. All of it goes into a checkpoint. In a run
    that is counted in steps an epoch is a tick, see ``TrainState``.
    """

    net: nn.Module
    optimizer: Optimizer
    schedule: Schedule
    lr_scheduler: LRScheduler | None = None
    lr_every_step: bool = False
    """Whether the scheduler is stepped after every optimizer step, and not after every epoch."""
    epoch: int = 0
    step: int = 0
    drawn: int = 0
    """Batches of the pass over the data that is under way, since these processes have it."""
    begun: int = 0
    """Entries of the data's order (see ``shares``) that others had done of that pass before these."""
    passed: int = 0
    """Entries of it that are done in all."""
    passes: int = 0
    """The passes before it."""
    dealt: str | None = None
    """How the data are dealt to the processes: ``Share.dealt``."""
    since: int = 0
    """The first epoch that was dealt so from its beginning."""
    tick: tuple[int, int] | None = None
    """At which optimizer steps the epoch, or the tick, begins and ends."""
    history: list[EpochRecord] = field(default_factory=list)
    """Of the epochs that are finished."""
    record: EpochRecord | None = None
    """Of the epoch that has begun."""
    totals: Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.float64))
    """Sums over the epoch so far, of this process: loss, metric, batches."""
    epoch_start: StateDict | None = None
    """The random generators at the start of that pass, of which its order comes."""
    course: StateDict | None = None
    """The random numbers that data are dealt by in several processes; in one they are the global ones."""
    phases: Phases | None = None
    """At work while the run is fitted."""
    hooks: StateDict = field(default_factory=dict)
    """Where its re-warm-up and its landing stood when it was left (see ``Phases.hooks_state``)."""
    scaler: torch.amp.GradScaler | None = None
    """Of the gradients, where it is trained in float16; ``fit`` makes it."""
    generators: tuple[torch.Generator, ...] = ()
    """Those that the data draws from, beside the global ones (see ``randomness.generators_of``)."""
    name: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Of this run alone: its files are known by it."""
    log: Log | None = None
    """Its history as far as it is on the disk."""

    @property
    def current(self) -> EpochRecord:
        """The record of the epoch that has begun."""
        assert self.record is not None, "no epoch has begun"
        return self.record

    def totals_of_all(self) -> Tensor:
        """The sums of all processes together, in which a step counts once whoever made it."""
        processes, totals = started(), self.totals.clone()
        processes.sum_([totals])
        return totals / processes.count

    def note(self, **figures: object) -> None:
        """Add figures to the record of the epoch that has begun."""
        self.record = self.current.with_figures(**figures)


CHECKPOINT = "checkpoint.safetensors"
HISTORY = "history.jsonl"
_PLACE = ("drawn", "begun", "passed", "passes", "dealt", "since", "tick")
_VERSION = 2  # without the history, which 1 had within


def save_run(run: Run, folder: Path) -> None:
    """Write the run's checkpoint and its history. Raises StoreError where the disk refuses, or for state that JSON
    cannot hold.

    All processes call it together; the first writes, and what it writes does not depend on how many they are, but for
    the random numbers that each has of its own.
    """
    processes, totals = started(), run.totals_of_all()
    random, *others = processes.gathered([random_state(run.generators), run.epoch_start])
    optimizer, weights = gathered(run.optimizer.state_dict()), _weights_of(run.net)
    together = {"optimizer": optimizer, "totals": totals, "random": random[0], "others": others}
    with processes.all_or_none(StoreError, "saving"):
        if processes.first:
            _write(run, folder, weights, together)


def _weights_of(net: nn.Module) -> dict[str, Tensor]:
    """The net's tensors, whole, by their names in a checkpoint; tied ones stay one."""
    known: dict[int, Any] = {}  # Any: a tensor, or nothing where another process has it
    weights = dict[str, Tensor]()
    for name, tensor in state_of(net).items():
        if id(tensor) not in known:
            known[id(tensor)] = gathered(tensor)
        weights[f"net.{name}"] = known[id(tensor)]
    return weights


def _write(run: Run, folder: Path, weights: dict[str, Tensor], together: StateDict) -> None:
    """together: the state that comes of all processes."""
    state = {
        "lr_scheduler": run.lr_scheduler.state_dict() if run.lr_scheduler is not None else None,
        "epoch_start": run.epoch_start if run.drawn or run.begun else None,
        "course": run.course,
        "scaler": run.scaler.state_dict() if run.scaler is not None else None,
        "hooks": run.hooks if run.phases is None else run.phases.hooks_state(),
        **together,
    }
    tree, tensors = flatten(state, "run")
    run.log = grown(run.log, folder / HISTORY, run.name, run.history)  # before the checkpoint that counts on it
    info = {
        **info_of(run.net),
        "run": run.name,
        "made_of": _made_of(run),
        "epoch": run.epoch,
        "step": run.step,
        **{name: getattr(run, name) for name in _PLACE},
        "record": run.record.to_json() if run.record is not None else {},
        "log": run.log.to_json(),
        "spectra": spectra_of(run.history),
        "state": tree,
    }
    store.write(folder / CHECKPOINT, weights | tensors, info, version=_VERSION)


def read_run(folder: Path) -> tuple[dict[str, torch.Tensor], JsonObject]:
    """The checkpoint of a run folder as it stands in the file. Raises StoreError."""
    if not folder.is_dir():
        raise StoreError(f"there is no folder {folder}: give a run of `dynrank-fx train`")
    if not (folder / CHECKPOINT).exists():
        raise StoreError(
            f"{folder} has no {CHECKPOINT}: it is not a run of `dynrank-fx train`, or stopped before its first "
            f"epoch ended"
        )
    tensors, info = store.read(folder / CHECKPOINT)
    if "log" in info:  # earlier versions have the history itself
        records, info["log"] = read_history(folder / HISTORY, info["run"], info["log"])
        info["history"] = with_spectra(records, info.get("spectra", {}))
    return tensors, info


def plan_in(info: JsonObject) -> Plan:
    """The plan that a checkpoint was trained by."""
    return Plan.from_json(info["plan"])


def history_in(info: JsonObject) -> list[EpochRecord]:
    """The records of the finished epochs in a checkpoint."""
    return [EpochRecord.from_json(record) for record in info["history"]]


def weights_in(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The net's own tensors in a checkpoint, by their names in its ``state_dict``."""
    return {name.removeprefix("net."): t for name, t in tensors.items() if name.startswith("net.")}


def restore_run_(run: Run, tensors: dict[str, torch.Tensor], info: JsonObject) -> None:
    """Bring a run that was set up as at its start (all sites FULL, nothing trained) to where the checkpoint stands.

    Raises StoreError where the checkpoint is of another model, optimizer or schedule.
    """
    for part, now in _made_of(run).items():
        if info["made_of"][part] != now:
            raise StoreError(
                f"the checkpoint was trained with the {part} {info['made_of'][part]}, not {now}: resume with the same "
                "options and model file"
            )
    restore_(run.net, weights_in(tensors), info, run.optimizer)
    state = unflatten(info["state"], tensors)
    try:
        run.optimizer.load_state_dict(state["optimizer"])
    except (ValueError, KeyError) as error:
        raise StoreError(
            f"the checkpoint's optimizer is not the one that optimizer(parameters) makes now: {error}"
        ) from error
    _restride(run.optimizer)
    if run.lr_scheduler is not None:
        run.lr_scheduler.load_state_dict(state["lr_scheduler"])
    run.name, run.log = info.get("run", run.name), info.get("log")
    run.epoch, run.step, run.history = info["epoch"], info["step"], history_in(info)
    _restore_place(run, info)
    run.record = EpochRecord.from_json(info["record"]) if info["record"] else None
    if run.step or run.history:
        run.optimizer._opt_called = True  # type: ignore[attr-defined]  # a scheduler warns where no step came before it
    run.totals = state["totals"].to(next(run.net.parameters()).device)
    run.hooks = state["hooks"]
    if state.get("scaler"):
        run.scaler = torch.amp.GradScaler(run.totals.device.type)
        run.scaler.load_state_dict(state["scaler"])
    _restore_random(run, state)


def _restore_place(run: Run, info: JsonObject) -> None:
    """Where the data stand. Earlier versions said less: they had one process and, the first, one pass in each epoch."""
    run.drawn = info.get("drawn", run.step)
    run.passes = info.get("passes", run.epoch)
    run.begun, run.passed = info.get("begun", 0), info.get("passed", 0)
    run.dealt, run.since = info.get("dealt"), info.get("since", 0)
    run.tick = tuple(info["tick"]) if info.get("tick") else None


def _restore_random(run: Run, state: StateDict) -> None:
    """Each process its own random numbers, and those that its pass over the data began with. One that was not there
    when the run was saved has the numbers that it begins with, and the pass of the first.
    """
    processes, (first, start), others = started(), (state["random"], state["epoch_start"]), state.get("others", ())
    run.course = state.get("course")
    if processes.count == 1 and run.course is not None:  # what data are dealt by becomes what all is drawn by
        first = {**run.course, "cuda": first["cuda"], "generators": first["generators"]}
        run.course = None
    new = random_state() | {"generators": first["generators"]}
    saved = [[first, start], *others]
    own, begun = saved[processes.rank] if processes.rank < len(saved) else (new, start)
    run.epoch_start = begun if start is not None else None
    set_random_state(own, run.generators)


def _made_of(run: Run) -> dict[str, str]:
    """What must be the same on a resume."""
    rates = "none" if run.lr_scheduler is None else type(run.lr_scheduler).__name__
    return {
        "schedule": said(run.schedule),
        "optimizer": type(run.optimizer).__name__,
        "learning-rate scheduler": rates + (" of every step" if run.lr_every_step else ""),
        "number of random generators in its data": str(len(run.generators)),
    }


def _restride(optimizer: Optimizer) -> None:
    """State in the memory format of its parameter, and aligned as new memory is: the file keeps neither."""
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                state[key] = torch.empty_like(parameter, dtype=value.dtype, device=value.device).copy_(value)
