"""Run the study: `python samples/study/run.py`. Rows that are done are kept in rows.jsonl and not run again.

Every run has one thread, so that JOBS of them go side by side; times under such load are not reported.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import json
import multiprocessing
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from guard import SpectralGuard
from methods import COST, METHODS, Costs, epochs_within
from results import write_results
from tasks import TASKS, StudyTask
from torch import nn
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import dynrank_fx as dr
from dynrank_fx.randomness import seed_all
from dynrank_fx.timing import interleaved, machine
from dynrank_fx.training import Run, Settings, Task, cost_of, fit, precision

HERE = Path(__file__).parent
ROWS, PHASES = HERE / "rows.jsonl", HERE / "phases.json"
SEEDS = (0, 1, 2)
MAIN = tuple(list(METHODS)[:8])
PARTS = tuple(list(METHODS)[8:12])
PLACEMENT = tuple(list(METHODS)[12:16])
STATE = tuple(list(METHODS)[16:21])
AGAIN = tuple(list(METHODS)[21:])
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


def train(cell: Cell) -> dict[str, Any]:
    """The row of one cell."""
    started = time.perf_counter()
    task = TASKS[cell.task]
    seed_all(cell.seed)
    net = task.transformed(dr.Ratio(cell.rank))
    costs = costs_of(net)
    epochs = task.epochs
    if cell.compute == "equal compute":
        epochs = epochs_within(cell.method, epochs, costs, COST * epochs)
    elif cell.compute == "equal time":
        auto = kept()[replace(cell, method="auto", compute="equal compute")]
        times = {phase: json.loads(PHASES.read_text())[cell.task][phase.name]["time"] for phase in dr.Phase}
        epochs = epochs_within(cell.method, epochs, times, sum(times[dr.Phase[p]] for p in auto["phases"]))
    elif cell.compute == "three times the epochs":
        epochs *= 3
    for compute in ("equal epochs", "equal compute"):
        if (done := kept().get(replace(cell, compute=compute))) is not None and done["epochs"] == epochs:
            return {**done, **asdict(cell)}
    way = METHODS[cell.method](epochs, costs)
    optimizer = task.optimizer(net.parameters())
    run = Run(net, optimizer, way.schedule, task.lr_scheduler(optimizer, epochs))
    settings = Settings(epochs, compile=False, device=task.device, amp=task.amp, **way.settings)
    if cell.method == "spectral norm held":
        SpectralGuard(net, optimizer)
    data = task.data()
    fit(run, data, settings)
    cut = run.history[-1]["truncated"]
    plan, history = dr.plan_of(net), run.history
    return {
        **asdict(cell),
        "epochs": epochs,
        "dense_epochs": task.epochs,
        "metric": history[-1]["eval_metric"],
        "loss": history[-1]["eval_loss"],
        "truncated": cut["eval_metric"],
        "truncated_loss": cut["eval_loss"],
        "spent": history[-1]["spent"] / task.epochs,
        "phases": [record["phase"] for record in history],
        "metrics": [record["eval_metric"] for record in history],
        "effective_rank": [mean(record["effective_rank"]) for record in history],
        "params": [plan.total_params, plan.low_params],
        "reasons": [record["reasons"] for record in history],
        "seconds": round(time.perf_counter() - started, 1),
        "machine": machine(),
    }


def mean(values: dict[str, float]) -> float:
    return round(sum(values.values()) / len(values), 2)


def costs_of(net: nn.Module) -> Costs:
    """What an epoch of each phase costs in dense epochs."""
    costs = {}
    for phase in dr.Phase:
        twin = copy.deepcopy(net)
        dr.enter_(twin, phase)
        costs[phase] = cost_of(twin)
    return costs


def measured(task: StudyTask, rank: float) -> dict[str, dict[str, float]]:
    """What a training step takes in each phase, over one in FULL: FLOPs counted by torch, time, bytes held between
    steps, and bytes at its peak.
    """
    seed_all(0)
    data = task.data()
    batch = next(iter(data.train_data))
    settings = Settings(1, device=task.device, amp=task.amp)
    steps, found = {}, {}
    for phase in dr.Phase:
        net = task.transformed(dr.Ratio(rank))
        optimizer = task.optimizer(net.parameters())
        dr.enter_(net, phase, optimizer)
        steps[phase] = partial(_step, net, optimizer, data, settings, batch)
        with FlopCounterMode(display=False) as counter:
            steps[phase]()
        held = list(net.parameters())
        held += [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
        held += [b for name, b in net.named_buffers() if name.endswith(".base")]
        held_bytes = sum(t.nbytes for t in held)
        found[phase.name] = {
            "flops": counter.get_total_flops(),
            "bytes": held_bytes,
            "peak": held_bytes + _most_allocated(steps[phase], task.device),
        }
    for phase in dr.Phase:
        found[phase.name]["time"] = interleaved(steps[dr.Phase.FULL], steps[phase], repeats=30).ratio
    dense = dict(found["FULL"])
    for values in found.values():
        values.update({what: values[what] / dense[what] for what in ("flops", "bytes", "peak")})
    return found


def _most_allocated(step: Callable[[], None], device: str) -> int:
    """The most bytes that the step has allocated at once: activations, gradients, temporaries. On the CPU by torch's
    profiler.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


def _step(net: nn.Module, optimizer: Optimizer, data: Task, settings: Settings, batch: Any) -> None:
    with precision(settings):
        loss = data.loss(net(batch[0]), batch)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def _work(cell: Cell) -> dict[str, Any]:
    if TASKS[cell.task].device == "cpu":
        torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    return train(cell)


def kept() -> dict[Cell, dict[str, Any]]:
    if not ROWS.exists():
        return {}
    rows = [json.loads(line) for line in ROWS.read_text().splitlines()]
    return {Cell(*(row[name] for name in Cell.__dataclass_fields__)): row for row in rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=["*"], metavar="PATTERN", help="shell patterns of task/method")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--fresh", action="store_true", help="run what is done too")
    parser.add_argument(
        "--time", action="store_true", help="measure the phases' steps again: with nothing else running"
    )
    options = parser.parse_args()
    done = {} if options.fresh else kept()
    wanted = [
        cell
        for cell in dict.fromkeys(cells())
        if cell not in done
        and (TASKS[cell.task].device == "cpu" or torch.cuda.is_available())
        and any(fnmatch.fnmatchcase(f"{cell.task}/{cell.method}", p) for p in options.only)
    ]
    print(f"{len(wanted)} runs to do, {len(done)} are done", file=sys.stderr)
    if wanted:
        with multiprocessing.get_context("spawn").Pool(options.jobs) as pool, ROWS.open("a") as file:
            for i, row in enumerate(pool.imap_unordered(_work, wanted)):
                file.write(json.dumps(row) + "\n")
                file.flush()
                what = f"{row['task']} / {row['method']} / {row['rank']} / {row['compute']} / {row['seed']}"
                print(f"{i + 1}/{len(wanted)} {what}: {row['truncated']:.4f} in {row['seconds']:.0f} s", flush=True)
    phases = json.loads(PHASES.read_text()) if PHASES.exists() else {}
    if options.time or not phases:
        torch.set_num_threads(1)
        there = "cuda" if torch.cuda.is_available() else "cpu"
        phases |= {name: measured(task, 0.25) for name, task in TASKS.items() if task.device == there}
        PHASES.write_text(json.dumps(phases, indent=1) + "\n")
    write_results(list(kept().values()), phases, HERE)


if __name__ == "__main__":
    main()
