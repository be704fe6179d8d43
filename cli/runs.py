"""Opening what a command is given: a run or a folder of ``transform``, with the model file it came from."""

from __future__ import annotations

import json
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
