"""The runs of the study: a grid of networks and ways to train them. Rows that are done are kept, and not run again.

A row is appended to rows.jsonl when its run ends; RESULTS.md and the pictures are written from all of them. Every run
has one thread, so that JOBS of them go side by side; times under such load are not reported.
"""

from __future__ import annotations

import copy
import json
import multiprocessing
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import dynrank_fx as dr
from benchmarks.result import Table
from benchmarks.study.guard import SpectralGuard
from benchmarks.study.methods import COST, METHODS, NARROWER, SCALED, Costs, epochs_within
from benchmarks.study.rows import rows_in
from benchmarks.study.tables import summary, write_results
from benchmarks.study.tasks import TASKS
from dynrank_fx.randomness import seed_all
from dynrank_fx.timing import machine
from dynrank_fx.training import Run, Settings, cost_of, fit

HERE = Path(__file__).parent
ROWS, PHASES = HERE / "rows.jsonl", HERE / "phases.json"
SEEDS = (0, 1, 2)
JOBS = 2
MAIN = tuple(list(METHODS)[:8])
PARTS = tuple(list(METHODS)[8:12])
PLACEMENT = tuple(list(METHODS)[12:16])
STATE = (*list(METHODS)[16:20], "spectral norm held")
AGAIN = tuple(name for name in METHODS if name.startswith("auto, tight"))
CLAIM = (*MAIN, NARROWER, SCALED)
"""What the paper says of itself, and what is beside it."""
GPT = ("auto", "low, spectral + Frobenius", "warm-up, then low", "dense", "low, random init", "paper, truncated")


@dataclass(frozen=True)
class Cell:
    """One run. compute: whether the epochs are the task's, three times as many, or what the budget of FLOPs allows,
    or what the time allows that ``auto`` took within that budget.
    """

    task: str
    method: str
    rank: float
    compute: str
    seed: int


def cells() -> Iterator[Cell]:
    """The grid, what matters most first: the primary cells in full, the others sparse."""
    for seed in SEEDS:
        yield Cell("scenes-resnet20", "dense", 0.5, "equal epochs", seed)
        yield from (Cell("scenes-resnet20", method, 0.5, "equal compute", seed) for method in CLAIM)
    yield Cell("scenes-wrn", "dense", 0.5, "equal epochs", 0)
    yield from (Cell("scenes-wrn", method, 0.5, "equal compute", 0) for method in CLAIM)
    for seed in SEEDS:
        for task in ("digits-conv", "digits-vit", "chars-64"):
            yield from (Cell(task, method, 0.25, "equal compute", seed) for method in MAIN)
            yield Cell(task, "dense", 0.25, "equal epochs", seed)
    for seed in SEEDS:
        for task in ("digits-conv", "digits-vit", "chars-64"):
            yield from (Cell(task, method, 0.25, "equal epochs", seed) for method in MAIN)
        for task in ("digits-conv", "chars-64"):
            yield from (Cell(task, method, 0.25, "equal epochs", seed) for method in (*PARTS, *PLACEMENT, *STATE))
        for task in ("digits-conv", "digits-vit", "chars-64"):
            yield from (Cell(task, method, 0.25, "equal epochs", seed) for method in AGAIN)
    for seed in SEEDS:
        yield Cell("chars-64", "low, spectral + Frobenius", 0.25, "three times the epochs", seed)
        for rank in (0.125, 0.5):
            for method in ("low, spectral + Frobenius", "warm-up, then low", "auto"):
                yield Cell("chars-64", method, rank, "equal compute", seed)
        for method in ("dense", "low, spectral + Frobenius", "warm-up, then low", "auto"):
            yield Cell("chars-128", method, 0.25, "equal compute", seed)
        yield Cell("chars-128", "dense", 0.25, "equal epochs", seed)
    for seed in SEEDS:
        yield from (Cell("chars-64", method, 0.25, "equal time", seed) for method in MAIN if method != "auto")
    for seed in SEEDS:
        yield Cell("gpt", "dense", 0.25, "equal epochs", seed)
        yield from (Cell("gpt", method, 0.25, "equal compute", seed) for method in GPT)


def train(cell: Cell, epochs: int | None = None) -> dict[str, Any]:
    """The row of one cell. epochs: in place of what the cell says, to see that it runs."""
    started = time.perf_counter()
    task = TASKS[cell.task]
    seed_all(cell.seed)
    net, share = task.transformed(dr.Ratio(cell.rank)), 1.0
    costs = costs_of(net)
    if cell.method == NARROWER:
        width, share = task.narrower(dr.Ratio(cell.rank), costs[dr.Phase.LOW])
        net = task.transformed(dr.Ratio(cell.rank), width)
        costs = dict.fromkeys(dr.Phase, share)
    dense_epochs = task.epochs if epochs is None else epochs
    if epochs is None:
        epochs = epochs_of(cell, costs)
        for compute in ("equal epochs", "equal compute"):
            if (done := kept().get(replace(cell, compute=compute))) is not None and done["epochs"] == epochs:
                return {**done, **asdict(cell)}
    way = METHODS[cell.method](epochs, costs)
    optimizer = task.optimizer(net.parameters())
    run = Run(net, optimizer, way.schedule, task.lr_scheduler(optimizer, epochs))
    settings = Settings(
        epochs, compile=False, device=task.device, amp=torch.bfloat16 if task.amp else None, **way.choices
    )
    if cell.method == "spectral norm held":
        SpectralGuard(net, optimizer)
    data = task.data()
    fit(run, data, settings)
    last = run.history[-1]
    cut = last.truncated if cell.method != NARROWER else {"eval_metric": last.eval_metric, "eval_loss": last.eval_loss}
    plan, history = dr.plan_of(net), run.history
    return {
        **asdict(cell),
        "epochs": epochs,
        "dense_epochs": dense_epochs,
        "metric": history[-1].eval_metric,
        "loss": history[-1].eval_loss,
        "truncated": cut["eval_metric"],
        "truncated_loss": cut["eval_loss"],
        "spent": share * history[-1].spent / len(history) * epochs / dense_epochs,
        "phases": [record.phase for record in history],
        "metrics": [record.eval_metric for record in history if record.eval_metric is not None],  # one an epoch
        "effective_rank": [mean(record.effective_rank) for record in history],
        "params": [plan.total_params, plan.total_params if cell.method == NARROWER else plan.low_params],
        "reasons": [record.reasons for record in history],
        "seconds": round(time.perf_counter() - started, 1),
        "machine": machine(),
    }


def epochs_of(cell: Cell, costs: Costs) -> int:
    """How many epochs a cell trains."""
    epochs = TASKS[cell.task].epochs
    if cell.compute == "equal compute":
        return epochs_within(cell.method, epochs, costs, COST * epochs)
    if cell.compute == "equal time":
        auto = kept()[replace(cell, method="auto", compute="equal compute")]
        times = {phase: json.loads(PHASES.read_text())[cell.task][phase.name]["time"] for phase in dr.Phase}
        return epochs_within(cell.method, epochs, times, sum(times[dr.Phase[p]] for p in auto["phases"]))
    return 3 * epochs if cell.compute == "three times the epochs" else epochs


def mean(values: Mapping[str, float]) -> float:
    return round(sum(values.values()) / len(values), 2)


def costs_of(net: nn.Module) -> Costs:
    """What an epoch of each phase costs in dense epochs."""
    costs = {}
    for phase in dr.Phase:
        twin = copy.deepcopy(net)
        dr.enter_(twin, phase)
        costs[phase] = cost_of(twin)
    return costs


def _work(cell: Cell) -> dict[str, Any]:
    if TASKS[cell.task].device == "cpu":
        torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    return train(cell)


def kept() -> dict[Cell, dict[str, Any]]:
    return rows_in(ROWS, Cell)


def study(quick: bool) -> Table:
    """Run what is missing of the grid (on a GPU, the cells of the GPT too); quick: one of the smallest cells, for two
    epochs, which is not kept.
    """
    if quick:
        return summary([train(Cell("digits-vit", "auto", 0.25, "equal epochs", 0), epochs=2)])
    done = kept()
    wanted = [
        cell
        for cell in dict.fromkeys(cells())
        if cell not in done and (TASKS[cell.task].device == "cpu" or torch.cuda.is_available())
    ]
    print(f"{len(wanted)} runs to do, {len(done)} are done", file=sys.stderr)
    if wanted:
        with multiprocessing.get_context("spawn").Pool(JOBS) as pool, ROWS.open("a") as file:
            for i, row in enumerate(pool.imap_unordered(_work, wanted)):
                file.write(json.dumps(row) + "\n")
                file.flush()
                what = f"{row['task']} / {row['method']} / {row['rank']} / {row['compute']} / {row['seed']}"
                said = f"{i + 1}/{len(wanted)} {what}: {row['truncated']:.4f} in {row['seconds']:.0f} s"
                print(said, file=sys.stderr, flush=True)
    rows = list(kept().values())
    write_results(rows, json.loads(PHASES.read_text()), HERE)
    return summary(rows)
