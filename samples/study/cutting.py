"""How to cut a trained model, and which training leaves one that is cut best: `python samples/study/cutting.py`.

Writes cutting.json, a picture for each network and the table in CUTTING.md. Seed 0, 16 batches of training inputs.
"""

from __future__ import annotations

import copy
import json
import multiprocessing
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from methods import METHODS
from run import costs_of
from tasks import TASKS, StudyTask
from torch import nn

import dynrank_fx as dr
from dynrank_fx.bench import machine
from dynrank_fx.onnxbench import bench_onnx
from dynrank_fx.presets import Preset
from dynrank_fx.randomness import seed_all
from dynrank_fx.train import Run, Settings, Task, evaluate, fit

HERE = Path(__file__).parent
RATIOS = (0.0625, 0.125, 0.25, 0.5)
WAYS = ("plain SVD", "calibrated", "budget on outputs", "+ 100 steps")
STYLES = dict(zip(WAYS, ("v:", "s--", "^-.", "o-"), strict=True))
BATCH = {"digits-conv": 64, "chars-64": 8, "digits-vit": 64}
"""Of the latencies."""


def _interleaved_to_full(epochs: int, costs: Any) -> Preset:
    """Phases that end with the dense weights: LOW, with FULL in every second epoch and at the end."""
    full = frozenset(range(1, epochs, 2)) | {epochs - 1}
    return Preset(lambda state: dr.Phase.FULL if state.epoch in full else dr.Phase.LOW)


TRAININGS: dict[str, Callable[[int, Any], Preset]] = {
    "dense": METHODS["dense"],
    "phases, ending FULL": _interleaved_to_full,
    "auto (rank 1/4)": METHODS["auto"],
    "LOW (rank 1/4)": METHODS["low, spectral + Frobenius"],
}


def trained(task: StudyTask, way: Callable[[int, Any], Preset]) -> nn.Module:
    """A net of seed 0 after the task's epochs, inflated, so that every way of cutting starts from dense weights."""
    seed_all(0)
    net = task.transformed(dr.ranks.Ratio(0.25))
    preset, optimizer = way(task.epochs, costs_of(net)), task.optimizer(net.parameters())
    run = Run(net, optimizer, preset.schedule, task.lr_scheduler(optimizer, task.epochs))
    fit(run, task.data(), Settings(task.epochs, compile=False, **preset.settings))
    dr.enter_(net, dr.Phase.FULL)
    return net.eval()


def calibration(task: StudyTask) -> list[tuple[torch.Tensor]]:
    return [(batch[0],) for batch, _ in zip(task.data().train_data, range(16), strict=False)]


def accuracy(model: nn.Module, data: Task) -> float:
    return float(evaluate(model, data, Settings(1, compile=False))["eval_metric"] or 0)


def params(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def exported(model: nn.Module, inputs: tuple[torch.Tensor], folder: str, name: str) -> Path:
    path = Path(folder) / f"{name}.onnx"
    dr.export_onnx(model, inputs, path, batch_sizes=(1,), tolerance=1e-3)
    return path


def latency(path: Path, against: Path, batch: int) -> float:
    """Time of a file over that of the other in onnxruntime, median of pairs."""
    return float(bench_onnx(path, against, batch_sizes=(batch,), repeats=40)[0].ratio or 0)


def cuts(net: nn.Module, ratio: float, batches: Sequence[Any], known: Any) -> dict[str, nn.Module]:
    """The net cut in every way, to as many parameters as one rank ratio for all sites gives."""
    policy = dr.ranks.Ratio(ratio)
    plain = dr.truncate(net, rank=policy)
    calibrated = dr.truncate(net, known, rank=policy)
    dr.recalibrate_(calibrated, batches)
    budget = dr.Budget(params=params(calibrated) / params(dr.inline(net)))
    best = dr.compress(net, batches[0], budget, batches).module
    recovered = copy.deepcopy(best)
    dr.recover_(recovered, dr.inline(net), batches, 100)
    return dict(zip(WAYS, (plain, calibrated, best, recovered), strict=True))


def points(name: str, folder: str) -> list[dict[str, Any]]:
    """Every training, way and size of a network, each with its file in the folder."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    task = TASKS[name]
    data, batches, found = task.data(), calibration(task), []

    def add(training: str, way: str, ratio: float | None, model: nn.Module) -> None:
        file = exported(model, batches[0], folder, f"{name}-{len(found)}")
        point = {"task": name, "training": training, "way": way, "ratio": ratio, "params": params(model)}
        found.append({**point, "accuracy": accuracy(model, data), "file": str(file)})
        print(found[-1], file=sys.stderr, flush=True)

    for training, way in TRAININGS.items():
        net = trained(task, way)
        add(training, "", None, dr.inline(net))
        known = dr.calibrate(net, batches)
        for ratio in RATIOS:
            for cut, model in cuts(net, ratio, batches, known).items():
                add(training, cut, ratio, model)
    return found


def draw(found: Sequence[dict[str, Any]], name: str) -> None:
    """Accuracy against parameters and against latency; a colour for each training, a line style for each way."""
    figure = Figure(figsize=(11, 5), layout="constrained", dpi=110)
    axes = figure.subplots(1, 2, sharey=True)
    dense = next(p for p in found if p["training"] == "dense" and not p["way"])
    for color, training in enumerate(TRAININGS):
        for way in WAYS:
            some = [p for p in found if (p["training"], p["way"]) == (training, way)]
            for axis, what, unit in ((axes[0], "params", dense["params"]), (axes[1], "latency", 1.0)):
                ordered = sorted(some, key=lambda p: p[what])
                axis.plot(
                    [p[what] / unit for p in ordered],
                    [100 * p["accuracy"] for p in ordered],
                    STYLES[way] if what == "params" else STYLES[way][0],  # small times scatter too much for a line
                    color=f"C{color}",
                    markersize=4,
                    linewidth=1.2,
                    label=f"{training}: {way}",
                )
    for axis, label in zip(axes, ("parameters over dense", "time in onnxruntime over dense"), strict=True):
        axis.axhline(100 * dense["accuracy"], color="black", linewidth=0.8)
        axis.set_xlabel(label)
    axes[0].set_ylabel("held-out accuracy, % (black: dense)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7, frameon=False)
    figure.savefig(HERE / f"cutting-{name}.png")


def write(found: Sequence[dict[str, Any]]) -> None:
    """CUTTING.md and the pictures."""
    parts = [f"# How to cut\n\nWritten by `python samples/study/cutting.py`; seed 0; {machine()}. {_ABOUT}"]
    for name in dict.fromkeys(p["task"] for p in found):
        mine = [p for p in found if p["task"] == name]
        draw(mine, name)
        lines = ["| training | parameters | " + " | ".join(WAYS) + " |", "| --- " * (len(WAYS) + 2) + "|"]
        for training in TRAININGS:
            dense = next(p for p in mine if p["training"] == training and not p["way"])
            lines.append(
                f"| {training} | {dense['params']:,} | {100 * dense['accuracy']:.2f} % not cut |" + "  |" * len(WAYS)
            )
            for ratio in RATIOS:
                some = {p["way"]: p for p in mine if p["training"] == training and p.get("ratio") == ratio}
                cells = (f"{100 * some[way]['accuracy']:.2f} % ({some[way]['latency']:.2f})" for way in WAYS)
                lines.append(f"| {training} | {some[WAYS[0]]['params']:,} | " + " | ".join(cells) + " |")
        parts += [f"## {name}", "\n".join(lines), f"![{name}](cutting-{name}.png)"]
    (HERE / "CUTTING.md").write_text("\n\n".join(parts) + "\n")


_ABOUT = (
    "Held-out accuracy, and in brackets the time in onnxruntime over that of the dense model (median of interleaved "
    "pairs, batch 64 for digits, 8 for characters). One rank ratio for all sites (1/16, 1/8, 1/4, 1/2) sets the number "
    "of parameters; *calibrated* has its batch norms recalibrated; *budget on outputs* is `compress` at as many "
    "parameters, then with 100 steps of recovery. *Auto* and *LOW* end with factors of rank 1/4. A dense "
    "model against another of its shape shows how far times scatter: 1.00 to 1.03 on digits, 0.93 to 1.11 on "
    "characters."
)


def main() -> None:
    names, path = sys.argv[1:] or list(BATCH), HERE / "cutting.json"
    known = json.loads(path.read_text()) if path.exists() else []
    with tempfile.TemporaryDirectory() as folder:
        with multiprocessing.get_context("spawn").Pool(2) as pool:
            made = pool.starmap(points, [(name, folder) for name in names], chunksize=1)
        for found in made:  # timed when nothing else runs any more
            files = [Path(point.pop("file")) for point in found]
            for point, file in zip(found, files, strict=True):
                point["latency"] = latency(file, files[0], BATCH[point["task"]])
            known = [point for point in known if point["task"] != found[0]["task"]] + found
    path.write_text(json.dumps(known, indent=1) + "\n")
    write(known)


if __name__ == "__main__":
    main()
