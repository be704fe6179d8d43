"""Opening what a command is given: a run or a folder of ``transform``, with the model file it came from."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynrank_fx.errors import StoreError

if TYPE_CHECKING:
    from torch import nn

    from .modelfile import ModelFile

RUN_FILE = "run.json"


@dataclass(frozen=True)
class Opened:
    """A net, the model file it was made from, and the history of its training (empty for a folder of ``transform``)."""

    net: nn.Module
    file: ModelFile
    history: list[dict[str, Any]]


@dataclass(frozen=True)
class Truncated:
    """What is exported of a run. batches: inputs that its cut was calibrated on. metric: None where none is known."""

    module: nn.Module
    batches: list[Any]
    metric: float | None


def truncated(opened: Opened, calibrate: int) -> Truncated:
    """The net with all of its sites in factors; those that are dense at the end are cut on so many calibration batches,
    the same ones every time.
    """
    from dynrank_fx.phase import Phase
    from dynrank_fx.randomness import seed_all
    from dynrank_fx.transition import phases_of
    from dynrank_fx.truncation import truncate

    if not set(phases_of(opened.net).values()) - {Phase.LOW}:
        known = opened.history[-1].get("truncated") if opened.history else None
        return Truncated(truncate(opened.net), [], (known or {}).get("eval_metric"))
    batches = []
    if opened.file.has_calibration:
        seed_all(0)
        batches = [opened.file.inputs(batch) for batch in opened.file.calibration_batches(calibrate)]
    module, metric = truncate(opened.net, batches or None), metric_of(opened.file)
    return Truncated(module, batches, None if metric is None else metric(module))


def metric_of(file: ModelFile) -> Callable[[nn.Module], float] | None:
    """The metric of a module on eval_data(); None where there is none."""
    import torch

    from dynrank_fx.task import Settings, Task, evaluate

    data = file.eval_data()
    if data is None or file.metric is None:
        return None
    task = Task((), lambda output, batch: torch.zeros(()), file.inputs, data, file.metric)

    def score(module: nn.Module) -> float:
        found = evaluate(module, task, Settings(1, compile=False))["eval_metric"]
        assert found is not None
        return found

    return score


def write_run_file(folder: Path, model_file: Path, options: dict[str, Any]) -> None:
    """Note in the run's folder what it was started with."""
    from dynrank_fx.store import write_text

    data = {"format": "dynrank-fx run", "version": 1, "model_file": str(model_file.resolve()), "options": options}
    write_text(folder / RUN_FILE, json.dumps(data, indent=1) + "\n")


def read_run_file(folder: Path) -> dict[str, Any]:
    """What ``write_run_file`` noted. Raises StoreError."""
    path = folder / RUN_FILE
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        assert data["format"] == "dynrank-fx run"
    except OSError as error:
        raise StoreError(
            f"{folder} is no run of `dynrank-fx train`: {path} could not be read ({error.strerror})"
        ) from error
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise StoreError(f"{path} is damaged or was not written by `dynrank-fx train`") from error
    if data.get("version") != 1:
        raise StoreError(
            f"{path} has version {data.get('version')}, this dynrank-fx reads version 1; upgrade dynrank-fx"
        )
    return data


def open_run(folder: Path, model_file: Path | None = None) -> Opened:
    """The net in a folder of ``train`` or ``transform``. Raises StoreError, ModelFileError and what loading raises."""
    from dynrank_fx.checkpoint import how_in, load, rebuilt, restore_
    from dynrank_fx.runfile import CHECKPOINT, plan_in, read_run, weights_in

    from .modelfile import load_model_file

    if not folder.exists():
        raise StoreError(f"there is no folder {folder}")
    if not (folder / CHECKPOINT).exists():
        if not (folder / "weights.safetensors").exists():
            raise StoreError(f"{folder} is neither a run of `dynrank-fx train` nor a folder of `dynrank-fx transform`")
        if model_file is None:
            raise StoreError(
                f"{folder} is a folder of `transform`, which does not note its model file: add --model MODEL.PY"
            )
        file = load_model_file(model_file)
        return Opened(load(folder, file.model(), file.example_inputs()), file, [])
    tensors, info = read_run(folder)
    file = load_model_file(model_file or Path(read_run_file(folder)["model_file"]))
    net = rebuilt(file.model(), plan_in(info), file.example_inputs(), how_in(info))
    restore_(net, weights_in(tensors), info)
    return Opened(net, file, info["history"])
