"""A training run on disk: one checkpoint file that holds everything, and the history as JSON lines to read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from . import store
from .checkpoint import info_of, restore_, state_of
from .errors import StoreError
from .optim import Rewarm
from .phase import Schedule
from .plan import Plan
from .randomness import random_state, set_random_state
from .statetree import flatten, unflatten
from .train import Run

CHECKPOINT = "checkpoint.safetensors"
HISTORY = "history.jsonl"


def save_run(run: Run, folder: Path) -> None:
    """Write the run's checkpoint and its history. Raises StoreError where the disk refuses, or for state that JSON
    cannot hold.
    """
    state = {
        "optimizer": run.optimizer.state_dict(),
        "lr_scheduler": run.lr_scheduler.state_dict() if run.lr_scheduler is not None else None,
        "random": random_state(),
        "epoch_start": run.epoch_start if run.step else None,
        "totals": run.totals,
        "rewarm": [run.rewarm.steps, run.rewarm.left] if run.rewarm and run.rewarm.left else None,
    }
    tree, tensors = flatten(state, "run")
    info = {
        **info_of(run.net),
        "schedule": _name(run.schedule),
        "epoch": run.epoch,
        "step": run.step,
        "record": run.record,
        "history": run.history,
        "state": tree,
    }
    weights = {f"net.{name}": tensor for name, tensor in state_of(run.net).items()}
    store.write(folder / CHECKPOINT, weights | tensors, info)
    store.write_text(folder / HISTORY, "".join(json.dumps(record) + "\n" for record in run.history))


def read_run(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The checkpoint of a run folder as it stands in the file. Raises StoreError."""
    if not folder.is_dir():
        raise StoreError(f"there is no folder {folder}")
    if not (folder / CHECKPOINT).exists():
        raise StoreError(
            f"{folder} has no {CHECKPOINT}: it is not a run of `dynrank-fx train`, or stopped before its first "
            f"epoch ended"
        )
    return store.read(folder / CHECKPOINT)


def plan_in(info: dict[str, Any]) -> Plan:
    """The plan that a checkpoint was trained by."""
    return Plan.from_json(info["plan"])


def weights_in(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The net's own tensors in a checkpoint, by their names in its ``state_dict``."""
    return {name.removeprefix("net."): t for name, t in tensors.items() if name.startswith("net.")}


def restore_run_(run: Run, tensors: dict[str, torch.Tensor], info: dict[str, Any]) -> None:
    """Bring a run that was set up as at its start (all sites FULL, nothing trained) to where the checkpoint stands.

    Raises StoreError where the checkpoint is of another model, optimizer or schedule.
    """
    if info["schedule"] != repr(run.schedule):
        raise StoreError(
            f"the checkpoint was trained by the schedule {info['schedule']}, not by {run.schedule!r}: resume "
            f"with the same options"
        )
    restore_(run.net, weights_in(tensors), info, run.optimizer)
    state = unflatten(info["state"], tensors)
    try:
        run.optimizer.load_state_dict(state["optimizer"])
    except (ValueError, KeyError) as error:
        raise StoreError(
            f"the checkpoint's optimizer is not the one that optimizer(parameters) makes now: {error}"
        ) from error
    if (run.lr_scheduler is None) != (state["lr_scheduler"] is None):
        raise StoreError("the checkpoint and the model file disagree on whether there is an lr_scheduler(optimizer)")
    if run.lr_scheduler is not None:
        run.lr_scheduler.load_state_dict(state["lr_scheduler"])
    run.epoch, run.step, run.record, run.history = info["epoch"], info["step"], info["record"], info["history"]
    run.totals = state["totals"].to(next(run.net.parameters()).device)
    run.epoch_start = state["epoch_start"]
    if state["rewarm"]:
        steps, left = state["rewarm"]
        run.rewarm = Rewarm(run.optimizer, steps, left)
    set_random_state(state["random"])


def _name(schedule: Schedule) -> str:
    """What tells schedules apart: the value of ours, the name of a user's own function."""
    return getattr(schedule, "__qualname__", None) or repr(schedule)
