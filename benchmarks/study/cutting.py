"""How to cut a trained model, and which training leaves one that is cut best.

Writes cutting.json, a picture for each network and the tables in CUTTING.md. Three seeds, 16 batches of training
inputs each; the files of seed 0 are timed when all else is done. Started anew it goes on: a seed of a network that is
in cutting.json is not made again, and files wait to be timed in runs/cutting.
"""

from __future__ import annotations

import copy
import json
import multiprocessing
import statistics
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn

import dynrank_fx as dr
from benchmarks.result import Cell, Column, Table
from benchmarks.study.cells import costs_of
from benchmarks.study.methods import METHODS
from benchmarks.study.tasks import TASKS, StudyTask
from dynrank_fx.compression import Candidates
from dynrank_fx.onnx import bound, loaded, random_inputs, session, table_rows
from dynrank_fx.randomness import seed_all
from dynrank_fx.timing import interleaved, machine
from dynrank_fx.tracing import flop_counter
from dynrank_fx.training import Preset, Run, Settings, Task, evaluate, fit

HERE = Path(__file__).parent
FILES = HERE.parents[1] / "runs" / "cutting"
SEEDS = (0, 1, 2)
RATIOS = (0.0625, 0.125, 0.25, 0.5)
WAYS = ("plain SVD", "calibrated", "budget", "+ 100 steps", "budget of FLOPs")
STYLES = dict(zip(WAYS, ("v:", "s--", "^-.", "o-", "x-."), strict=True))
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


def trained(
    task: StudyTask,
    way: Callable[[int, Any], Preset],
    seed: int = 0,
    epochs: int | None = None,
    *,
    width: int | None = None,
) -> nn.Module:
    """A net after the task's epochs, or so many; of the task's width, or another."""
    seed_all(seed)
    epochs = epochs or task.epochs
    net = task.transformed(dr.Ratio(0.25), width)
    preset, optimizer = way(epochs, costs_of(net)), task.optimizer(net.parameters())
    run = Run(net, optimizer, preset.schedule, task.lr_scheduler(optimizer, epochs))
    fit(run, task.data(), Settings(epochs, compile=False, **preset.choices))
    return net.eval()


def calibration(task: StudyTask) -> list[tuple[torch.Tensor]]:
    return [(batch[0],) for batch, _ in zip(task.data().train_data, range(16), strict=False)]


def accuracy(model: nn.Module, data: Task) -> float:
    return float(evaluate(model, data, Settings(1, compile=False))["eval_metric"] or 0)


def params(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def exported(model: nn.Module, inputs: tuple[torch.Tensor], folder: Path, name: str) -> Path:
    path = folder / f"{name}.onnx"
    dr.export_onnx(model, inputs, path, batch_sizes=(1,), tolerance=1e-3)
    return path


def latency(path: Path, against: Path, batch: int) -> float:
    """Time of a file over that of the other in onnxruntime on the CPU, median of pairs."""
    opened, rows = [session(each, ("CPUExecutionProvider",)) for each in (against, path)], table_rows(loaded(path))
    first, second = (bound(each, random_inputs(each, batch, rows=rows)) for each in opened)
    return interleaved(first, second, repeats=20, warmup=10).ratio


def cuts(full: nn.Module, ratio: float, candidates: Candidates) -> dict[str, nn.Module]:
    """A net in FULL cut in every way, to as many parameters (or FLOPs) as one rank ratio for all sites gives.
    candidates: what ``compress`` makes its cuts by, of the net as its training left it.
    """
    policy, dense, batches = dr.Ratio(ratio), candidates.dense, candidates.data or ()
    plain = dr.truncate(full, rank=policy)
    calibrated = dr.truncate(full, candidates.known, rank=policy)
    dr.recalibrate_(calibrated, batches, like=dense)
    size = dr.Budget(params=params(calibrated) / params(dense))
    flops = dr.Budget(flops=flops_of(calibrated, batches[0]) / flops_of(dense, batches[0]))
    best, quick = (candidates.best(budget).module for budget in (size, flops))
    recovered = copy.deepcopy(best)
    dr.recover_(recovered, dense, batches, 100)
    return dict(zip(WAYS, (plain, calibrated, best, recovered, quick), strict=True))


def flops_of(model: nn.Module, inputs: Any) -> int:
    with flop_counter() as counter, torch.no_grad():
        model(*inputs)
    return counter.get_total_flops()


def points(
    name: str,
    seed: int,
    *,
    epochs: int | None = None,
    ratios: Sequence[float] = RATIOS,
    trainings: Sequence[str] = tuple(TRAININGS),
    files: bool = True,
) -> list[dict[str, Any]]:
    """Every training, way and size of a network and a seed; those of seed 0 have their file, where files are wanted."""
    task = TASKS[name]
    found: list[dict[str, Any]] = []

    def add(training: str, way: str, ratio: float | None, model: nn.Module) -> None:
        point = {"task": name, "seed": seed, "training": training, "way": way, "ratio": ratio, "params": params(model)}
        found.append({**point, "flops": flops_of(model, batches[0]), "accuracy": accuracy(model, data)})
        if seed == 0 and files:
            found[-1]["file"] = exported(model, batches[0], FILES, f"{name}-{len(found)}").name
        print(found[-1], file=sys.stderr, flush=True)

    for training in trainings:
        net = trained(task, TRAININGS[training], seed, epochs)
        data, batches = task.data(), calibration(task)
        full = copy.deepcopy(net)
        dr.enter_(full, dr.Phase.FULL)
        dense, phases = dr.inline(full), dr.phases_of(net)
        add(training, "", None, dense)
        low = {row.site.name: row.rank for row in dr.plan_of(net).sites if phases[row.site.name] is dr.Phase.LOW}
        candidates = Candidates(full, dense, batches, dr.calibrate(full, batches), low=low)
        for ratio in ratios:
            for cut, model in cuts(full, ratio, candidates).items():
                add(training, cut, ratio, model)
    return found


def time_all(found: Sequence[dict[str, Any]]) -> None:
    """Put the latencies, over the dense model's, in the place of files."""
    for point in [point for point in found if "file" in point]:
        dense = FILES / f"{point['task']}-1.onnx"
        point["latency"] = latency(FILES / point.pop("file"), dense, BATCH[point["task"]])


def mean(found: Sequence[dict[str, Any]], what: str) -> float:
    """Over the seeds; latencies are of one."""
    return statistics.mean(point[what] for point in found if what in point)


def share(found: Sequence[dict[str, Any]]) -> str:
    """Mean and spread of an accuracy over the seeds."""
    values = [100 * point["accuracy"] for point in found]
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread} %"


def draw(found: Sequence[dict[str, Any]], name: str) -> None:
    """Accuracy against parameters and against latency; a colour for each training, a line style for each way."""
    figure = Figure(figsize=(11, 5), layout="constrained", dpi=110)
    axes = figure.subplots(1, 2, sharey=True)
    dense = of(found, "dense", "", None)
    for color, training in enumerate(TRAININGS):
        for way in WAYS:
            sizes = [of(found, training, way, ratio) for ratio in RATIOS]
            for axis, what, unit in ((axes[0], "params", mean(dense, "params")), (axes[1], "latency", 1.0)):
                ordered = sorted(sizes, key=lambda some: mean(some, what))
                axis.plot(
                    [mean(some, what) / unit for some in ordered],
                    [100 * mean(some, "accuracy") for some in ordered],
                    STYLES[way] if what == "params" else STYLES[way][0],  # small times scatter too much for a line
                    color=f"C{color}",
                    markersize=4,
                    linewidth=1.2,
                    label=f"{training}: {way}",
                )
    for axis, label in zip(axes, ("parameters over dense", "time in onnxruntime over dense"), strict=True):
        axis.axhline(100 * mean(dense, "accuracy"), color="black", linewidth=0.8)
        axis.set_xlabel(label)
    axes[0].set_ylabel("held-out accuracy, % (black: dense)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7, frameon=False)
    figure.savefig(HERE / f"cutting-{name}.png")


def of(found: Sequence[dict[str, Any]], training: str, way: str, ratio: float | None) -> list[dict[str, Any]]:
    return [p for p in found if (p["training"], p["way"], p["ratio"]) == (training, way, ratio)]


def _scatter(found: Sequence[dict[str, Any]]) -> str:
    """Of the times of uncut models, by network."""
    uncut = [p for p in found if not p["way"] and "latency" in p]
    each = {
        name: [p["latency"] for p in uncut if p["task"] == name] for name in dict.fromkeys(p["task"] for p in uncut)
    }
    return ", ".join(f"{min(values):.2f} to {max(values):.2f} on {name}" for name, values in each.items())


def write(found: Sequence[dict[str, Any]]) -> None:
    """CUTTING.md and the pictures."""
    about = _ABOUT.format(scatter=_scatter(found))
    parts = [f"# How to cut\n\nWritten by `python benchmarks/run.py cutting`; {machine()}. {about}"]
    for name in dict.fromkeys(p["task"] for p in found):
        mine = [p for p in found if p["task"] == name]
        draw(mine, name)
        lines = ["| training | size | " + " | ".join(WAYS) + " |", "| --- " * (len(WAYS) + 2) + "|"]
        total = mean(of(mine, "dense", "", None), "params")
        for training in TRAININGS:
            dense = of(mine, training, "", None)
            lines.append(f"| {training} | 1.00 | not cut: {share(dense)} |" + "  |" * (len(WAYS) - 1))
            for ratio in RATIOS:
                some = {way: of(mine, training, way, ratio) for way in WAYS}
                cells = (f"{share(some[way])} ({mean(some[way], 'latency'):.2f})" for way in WAYS)
                size = mean(some[WAYS[0]], "params") / total
                lines.append(f"| {training} | {size:.2f} | " + " | ".join(cells) + " |")
        seeds = len({p["seed"] for p in mine})
        parts += [
            f"## {name}, {seeds} seed{'s' if seeds > 1 else ''}, {total:,.0f} parameters",
            "\n".join(lines),
            f"![{name}](cutting-{name}.png)",
        ]
    (HERE / "CUTTING.md").write_text("\n\n".join(parts) + "\n")


_ABOUT = (
    "Held-out accuracy, mean and deviation over the seeds, and in brackets the time in onnxruntime over that of "
    "the dense model of seed 0 (median of interleaved pairs, batch 64 for digits, 8 for characters). One rank "
    "ratio for all sites (1/16, 1/8, 1/4, 1/2) sets the size, a share of the dense parameters; *calibrated* has "
    "its batch norms recalibrated; *budget* is `compress` at as many parameters, then with 100 steps of recovery; "
    "*budget of FLOPs* is `compress` at as many FLOPs as *calibrated* has, whatever its parameters. *Auto* and "
    "*LOW* end with factors of rank 1/4, of which `compress` takes nothing away where the size allows it. A dense "
    "model against another of its shape (the rows of size 1.00) shows how far times scatter: {scatter}."
)


def cutting(quick: bool) -> Table:
    """Make what is missing, time all files and write everything; quick: one training, not kept and not timed."""
    if quick:
        return summary(points("digits-vit", 0, epochs=1, ratios=(0.25,), trainings=("dense",), files=False))
    path = HERE / "cutting.json"
    known = json.loads(path.read_text()) if path.exists() else []
    FILES.mkdir(parents=True, exist_ok=True)
    there = {(point["task"], point["seed"]) for point in known}
    missing = [(name, seed) for seed in SEEDS for name in BATCH if (name, seed) not in there]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        for found in pool.imap(_points, missing):
            known += found
            path.write_text(json.dumps(known, indent=1) + "\n")
    time_all(known)
    known.sort(key=lambda point: (list(BATCH).index(point["task"]), point["seed"]))
    path.write_text(json.dumps(known, indent=1) + "\n")
    write(known)
    return summary(known)


def summary(found: Sequence[dict[str, Any]]) -> Table:
    """A line for each network, training and size: the mean accuracy over the seeds."""
    rows: list[tuple[Cell, ...]] = []
    for name, training in dict.fromkeys((p["task"], p["training"]) for p in found):
        mine = [p for p in found if p["task"] == name and p["training"] == training]
        whole = of(mine, training, "", None)
        for ratio in sorted({p["ratio"] for p in mine if p["ratio"]}):
            some = {way: of(mine, training, way, ratio) for way in WAYS}
            size = mean(some[WAYS[0]], "params") / mean(whole, "params")
            scores = [100 * mean(each, "accuracy") for each in (whole, *some.values())]
            rows.append((name, len(whole), training, size, *scores))
    head = Column("network"), Column("seeds"), Column("training"), Column("share of parameters", spec=".2f")
    ways = (Column(way, "%", ".2f") for way in ("not cut", *WAYS))
    return Table(
        (*head, *ways), tuple(rows), "Held-out accuracy; CUTTING.md of the study has the times and deviations."
    )


def _points(cell: tuple[str, int]) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    return points(*cell)
