"""Opening what a command is given: a run or a folder of ``transform``, with the model file it came from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dynrank_fx.aliases import Json, JsonObject
from dynrank_fx.errors import StoreError, first_line
from dynrank_fx.files import finish
from dynrank_fx.seals import check_zip

from .streams import echo

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dynrank_fx.compression import SiteTimes
    from dynrank_fx.schedules import EpochRecord
    from dynrank_fx.tracing import ExampleInputs

    from .modelfile import ModelFile

RUN_FILE = "run.json"


@dataclass(frozen=True)
class Opened:
    """A net, the model file it was made from, and the history of its training (empty for a folder of ``transform``)."""

    net: nn.Module
    file: ModelFile
    history: list[EpochRecord]


@dataclass(frozen=True)
class FinalForm:
    """A module to export. real: calibration batches to compare it on. metadata: for its file. dense: makes the same
    model with dense weights; None of a module that is no run's. left_dense: the sites that stayed dense for their time.
    """

    module: nn.Module
    file: ModelFile
    real: list[ExampleInputs]
    metadata: dict[str, str]
    dense: Callable[[], nn.Module] | None = None
    left_dense: tuple[str, ...] = ()


def final_form(
    source: Path, model_file: Path | None, weights: Path | None, calibrate: int, times: SiteTimes | None = None
) -> FinalForm:
    """What is deployed of a run or a folder of ``transform`` (its truncation), of a model file (the model), or of a
    .pt file of ``compress``. times: tells which sites of the first are to be dense. Raises StoreError and
    ModelFileError.
    """
    if source.suffix in (".py", ".pt") or source.is_file():
        if times is not None:
            raise StoreError(
                f"--never-slower is of a run or a folder of `transform`, which {source} is not: leave it out"
            )
        module, file = _module_of(source, model_file, weights)
        return FinalForm(module.eval(), file, calibration_inputs(file, calibrate), {})
    if weights is not None:
        raise StoreError(f"{source} has its own weights: leave out --weights")
    from dynrank_fx.compression import dense_form, deployed

    opened = open_run(source, model_file)
    batches = calibration_inputs(opened.file, calibrate)

    def metric(module: nn.Module) -> float | None:
        score = metric_of(opened.file)  # only now, as it draws the data
        return None if score is None else score(module)

    measured = opened.history[-1].truncated.get("eval_metric") if opened.history else None
    result = deployed(opened.net, batches, metric=metric, measured=measured, times=times)
    dense = partial(dense_form, opened.net)
    return FinalForm(result.module, opened.file, batches, result.metadata, dense, result.left_dense)


def _module_of(source: Path, model_file: Path | None, weights: Path | None) -> tuple[nn.Module, ModelFile]:
    from .modelfile import load_model_file

    if source.suffix != ".pt":
        if model_file is not None:
            raise StoreError(f"--model is of a run or a .pt file, and {source} is neither: leave it out")
        file = load_model_file(source, weights)
        return file.model(), file
    if model_file is None:
        raise StoreError(f"{source} has no example inputs: add --model MODEL.PY, the model file that it was made from")
    if weights is not None:
        raise StoreError(f"{source} has its own weights: leave out --weights")
    return _stored_module(source), load_model_file(model_file)


def _stored_module(path: Path) -> nn.Module:
    import torch
    from torch import nn

    if path.exists():
        check_zip(path)
    try:
        module = torch.load(path, weights_only=False)
    except FileNotFoundError as error:
        raise StoreError(f"there is no file {path}: give one that `dynrank-fx compress` wrote") from error
    except Exception as error:  # what is unpickled may raise anything
        raise StoreError(f"{path} could not be loaded ({first_line(error)[:200]})") from error
    if not isinstance(module, nn.Module):
        raise StoreError(
            f"{path} holds a {type(module).__name__} and no module: give weights by --weights, and MODEL.PY"
        )
    return module


def calibration_inputs(file: ModelFile, count: int) -> list[ExampleInputs]:
    """Inputs of so many calibration batches, the same ones every time; none where the file has no data."""
    from dynrank_fx.randomness import seed_all

    if not file.has_calibration:
        return []
    seed_all(0)
    return [file.inputs(batch) for batch in file.calibration_batches(count)]


def metric_of(file: ModelFile) -> Callable[[nn.Module], float] | None:
    """The metric of a module on eval_data(); None where there is none."""
    import torch

    from dynrank_fx.training import Settings, Task, evaluate

    data = file.eval_data()
    if data is None or file.metric is None:
        return None
    task = Task((), lambda output, batch: torch.zeros(()), file.inputs, data, file.metric, file.guard)

    def score(module: nn.Module) -> float:
        mean = evaluate(module, task, Settings(1, compile=False))["eval_metric"]
        assert mean is not None
        return mean

    return score


def write_run_file(folder: Path, model_file: Path, options: JsonObject, **facts: Json) -> None:
    """Note in the run's folder what it was started with. facts: what else a report tells of it."""
    from dynrank_fx.files import write_text

    data = {"format": "dynrank-fx run", "version": 1, "model_file": str(model_file.resolve()), "options": options}
    data |= facts
    write_text(folder / RUN_FILE, json.dumps(data | {"sha256": _digest(data)}, indent=1) + "\n")


def _digest(data: JsonObject) -> str:
    """Of all but the digest itself."""
    rest = {name: value for name, value in data.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_run_file(folder: Path) -> JsonObject:
    """What ``write_run_file`` noted. Raises StoreError."""
    path = folder / RUN_FILE
    try:
        data: JsonObject = json.loads(path.read_text(encoding="utf-8"))
        assert data["format"] == "dynrank-fx run"
    except OSError as error:
        raise StoreError(
            f"{folder} is no run of `dynrank-fx train`: {path} could not be read ({error.strerror})"
        ) from error
    except (ValueError, KeyError, TypeError, AssertionError, RecursionError) as error:
        raise StoreError(f"{path} is damaged or was not written by `dynrank-fx train`") from error
    if data.get("version") != 1:
        raise StoreError(
            f"{path} has version {data.get('version')}, this dynrank-fx reads version 1; upgrade dynrank-fx"
        )
    if data.get("sha256", _digest(data)) != _digest(data):  # earlier versions wrote none
        raise StoreError(
            f"{path} is damaged or was edited: its checksum does not match its content; put an earlier copy back"
        )
    wrong = [name for name, kind in _KINDS.items() if not isinstance(data.get(name, _DEFAULTS.get(name)), kind)]
    if wrong:
        raise StoreError(f"{path} is damaged: its {wrong[0]} is {data.get(wrong[0])!r}; put an earlier copy back")
    return data


_KINDS = {
    "model_file": str,
    "options": dict,
    "run": str,
    "job": str | None,
    "epochs": int | None,
    "epochs_set": bool,
    "pilot": dict | None,
    "metric": str,
    "versions": dict,
}
"""What is in the file of a run, by name."""
_DEFAULTS: JsonObject = {"run": "", "epochs_set": False, "metric": "", "versions": {}}  # earlier versions noted less


def set_epochs_of_run_(file: ModelFile, noted: JsonObject) -> None:
    """Let the file's model() see the `epochs` that it saw when the run began. noted: what ``read_run_file`` read."""
    if noted.get("epochs_set"):  # earlier versions left the file's own
        epochs = noted["options"].get("epochs")
        file.set_epochs_(epochs if isinstance(epochs, int) else None)


def read_own_run(folder: Path) -> tuple[dict[str, Tensor], JsonObject]:
    """The checkpoint of a run. Raises StoreError, also where it is of another run than ``run.json``."""
    from dynrank_fx.training import CHECKPOINT, read_run

    tensors, info = read_run(folder)
    if (folder / RUN_FILE).exists():
        name = read_run_file(folder).get("run")
        if name is not None and info.get("run") not in (name, None):
            raise StoreError(
                f"{folder / CHECKPOINT} is of another run than {folder / RUN_FILE}: put back the file that belongs to "
                "the other"
            )
    return tensors, info


def _named_model_file(folder: Path) -> Path:
    """The model file that a run names, which is said, as it is about to run. Raises StoreError for one that came with
    the run itself.
    """
    path = Path(read_run_file(folder)["model_file"])
    if not path.is_absolute() or path.resolve().is_relative_to(folder.resolve()):
        raise StoreError(
            f"{folder / RUN_FILE} names the model file {path}, which would run code that came along with the run: look "
            "at it, and give it by --model if you trust it"
        )
    echo(f"running {path}, the model file that {folder / RUN_FILE} names", err=True)
    return path


def open_run(folder: Path, model_file: Path | None = None) -> Opened:
    """The net in a folder of ``train`` or ``transform``. Raises StoreError, ModelFileError and what loading raises."""
    from dynrank_fx.phases import how_in, load, rebuilt, restore_
    from dynrank_fx.training import CHECKPOINT, history_in, plan_in, weights_in

    from .modelfile import load_model_file

    finish(folder)
    if not folder.exists():
        raise StoreError(
            f"there is no folder {folder}: give a run of `dynrank-fx train` or a folder of `dynrank-fx transform`"
        )
    if not (folder / CHECKPOINT).exists():
        if not (folder / "weights.safetensors").exists():
            raise StoreError(
                f"{folder} is neither a run of `dynrank-fx train` nor a folder of `dynrank-fx transform`: give one"
            )
        if model_file is None:
            raise StoreError(
                f"{folder} is a folder of `transform`, which does not note its model file: add --model MODEL.PY"
            )
        file = load_model_file(model_file)
        return Opened(load(folder, file.model(), file.example_inputs()), file, [])
    tensors, info = read_own_run(folder)
    file = load_model_file(model_file or _named_model_file(folder))
    if (folder / RUN_FILE).exists():
        set_epochs_of_run_(file, read_run_file(folder))
    net = rebuilt(file.model(), plan_in(info), file.example_inputs(), how_in(info))
    restore_(net, weights_in(tensors), info)
    return Opened(net, file, history_in(info))
