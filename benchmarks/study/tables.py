"""The study's rows as tables and pictures: RESULTS.md and PNG files beside it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.result import Column, Table

Row = dict[str, Any]

_COMMAND = "python benchmarks/run.py study"
COMPUTES = ("equal compute", "equal time", "equal epochs", "three times the epochs")
COLUMNS = (
    Column("network"),
    Column("rank", spec="g"),
    Column("compared at"),
    Column("method"),
    Column("seeds"),
    Column("compute", spec=".2f"),
    Column("accuracy", "%", ".2f"),
    Column("its deviation", spec=".2f"),
    Column("truncated", "%", ".2f"),
    Column("its deviation", spec=".2f"),
)


def summary(rows: list[Row]) -> Table:
    """A line for each method, network, rank and comparison, over the seeds."""
    lines = []
    for key in dict.fromkeys((r["task"], r["rank"], r["compute"], r["method"]) for r in rows):
        some = [r for r in rows if (r["task"], r["rank"], r["compute"], r["method"]) == key]
        spent = statistics.mean(r["spent"] for r in some)
        scores = (*_mean_and_deviation(some, "metric"), *_mean_and_deviation(some, "truncated"))
        lines.append((*key, len(some), spent, *scores))
    lines.sort(key=lambda line: (line[0], line[1] != 0.25, line[1], COMPUTES.index(line[2])))
    note = (
        "Held-out accuracy in percent, as trained and after truncation: mean and standard deviation over the seeds. "
        "Compute is in FLOPs, over dense training for all epochs of the task."
    )
    return Table(COLUMNS, tuple(lines), note)


def _mean_and_deviation(rows: list[Row], what: str) -> tuple[float, float | None]:
    values = [100 * row[what] for row in rows]
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def write_results(rows: list[Row], phases: dict[str, dict[str, dict[str, float]]], folder: Path) -> None:
    """phases: by task and phase what a step takes, over a step of FULL: ``flops``, ``time``, ``bytes``, ``peak``."""
    parts = [_head(rows), _phases(phases)]
    for task in dict.fromkeys(row["task"] for row in rows):
        parts.append(f"## {task}")
        ranks = sorted({row["rank"] for row in rows if row["task"] == task}, key=lambda rank: (rank != 0.25, rank))
        for rank, compute in product(ranks, COMPUTES):
            some = [r for r in rows if (r["task"], r["compute"], r["rank"]) == (task, compute, rank)]
            if some:
                said = "1/4" if rank == 0.25 else f"{rank:g}"
                parts += [f"Rank {said}, {compute}:", _methods(some, phases.get(task, {}))]
        if _draw(rows, task, folder / f"{task}.png"):
            parts.append(f"![{task}]({task}.png)")
    (folder / "RESULTS.md").write_text("\n\n".join(parts) + "\n")


def _head(rows: list[Row]) -> str:
    machines = ", ".join(sorted({row["machine"] for row in rows}))
    seeds = sorted({row["seed"] for row in rows})
    return (
        "# The study\n\n"
        f"Written by `{_COMMAND}`, a row at a time (`rows.jsonl`), seeds {', '.join(map(str, seeds))}; machine: "
        f"{machines}, two cores, one thread a run; {sum(row['seconds'] for row in rows) / 3600:.1f} hours of one core. "
        "Mean and standard deviation over the seeds that are done. *Epochs*: of "
        "the method, with the learning-rate schedule stretched to them; at equal compute as many as 0.75 of dense "
        "training's FLOPs allow, at equal time as many as the measured time of `auto` allows. *Compute*: FLOPs over "
        "those of dense training at the task's own number of epochs, by the plan; *time*: the same by measured step "
        "times; *peak*: memory, over that of dense training. *Rank*: mean effective rank of the sites after the first "
        "and the last epoch. In *phases*, F is FULL, L LOW, A ADAPTOR, a dot an epoch of mixed phases."
    )


def _phases(phases: dict[str, dict[str, dict[str, float]]]) -> str:
    lines = [
        (
            task,
            *(f"{of[phase][what]:.2f}" for phase in ("LOW", "ADAPTOR") for what in ("flops", "time", "bytes", "peak")),
        )
        for task, of in phases.items()
    ]
    head = ("task", *(f"{p} {w}" for p in ("LOW", "ADAPTOR") for w in ("FLOPs", "time", "bytes", "peak")))
    return (
        "A training step over one in FULL, rank 1/4: FLOPs counted by torch, time as median of interleaved pairs, "
        "bytes of parameters and optimizer state (*bytes*), and those with the activations, gradients and temporaries "
        "at the highest point of the step (*peak*, by torch's profiler):\n\n" + _table(head, lines)
    )


def _methods(rows: list[Row], phases: dict[str, dict[str, float]]) -> str:
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        some = sorted((row for row in rows if row["method"] == method), key=lambda row: row["seed"])
        first = some[0]
        lines.append(
            (
                method,
                len(some),
                first["epochs"],
                f"{statistics.mean(r['spent'] for r in some):.2f}",
                _time(some, phases),
                _peak(some, phases),
                _percent([r["metric"] for r in some]),
                _percent([r["truncated"] for r in some]),
                f"{statistics.mean(r['truncated_loss'] for r in some):.4f}",
                f"{statistics.mean(r['effective_rank'][0] for r in some):.0f} → "
                f"{statistics.mean(r['effective_rank'][-1] for r in some):.0f}",
                f"{first['params'][1]:,}",
                "".join(p[0] if " " not in p else "." for p in first["phases"]),
            )
        )
    head = (
        "method",
        "seeds",
        "epochs",
        "compute",
        "time",
        "peak",
        "accuracy",
        "truncated",
        "its loss",
        "rank",
        "parameters",
        "phases",
    )
    return _table(head, lines)


def _time(rows: list[Row], phases: dict[str, dict[str, float]]) -> str:
    """Step times of the phases over that of FULL, summed over the epochs, where no epoch mixes them."""
    if not phases or any(" " in phase for row in rows for phase in row["phases"]):
        return ""
    total = statistics.mean(sum(phases[phase]["time"] for phase in row["phases"]) for row in rows)
    return f"{total / rows[0]['dense_epochs']:.2f}"


def _peak(rows: list[Row], phases: dict[str, dict[str, float]]) -> str:
    """Peak memory of a run, over that of dense training: of its most expensive phase."""
    entered = {phase for row in rows for phase in row["phases"]}
    return f"{max(phases[phase]['peak'] for phase in entered):.2f}" if entered <= phases.keys() else ""


def _percent(values: Sequence[float]) -> str:
    mean = 100 * statistics.mean(values)
    return f"{mean:.2f} ± {100 * statistics.stdev(values):.2f} %" if len(values) > 1 else f"{mean:.2f} %"


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = (head, ["---"] * len(head), *rows)
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _draw(rows: list[Row], task: str, path: Path) -> bool:
    """Mean effective rank over the epochs, and accuracy against compute, of the main methods at equal compute."""
    mine = [r for r in rows if (r["task"], r["rank"]) == (task, 0.25)]
    mine = [r for r in mine if r["compute"] == "equal compute" or r["method"] == "dense"]
    if not mine:
        return False
    figure = Figure(figsize=(10, 4), layout="constrained", dpi=120)
    ranks, scores = figure.subplots(1, 2)
    for key in dict.fromkeys((r["method"], r["compute"]) for r in mine):
        some = [r for r in mine if (r["method"], r["compute"]) == key]
        length = min(len(r["metrics"]) for r in some)
        at = [(i + 1) / length * statistics.mean(r["spent"] for r in some) for i in range(length)]
        label = key[0] if key != ("dense", "equal epochs") else "dense, all of its epochs"
        style = "--" if key[0] == "dense" else "-"
        mean = [statistics.mean(r["effective_rank"][i] for r in some) for i in range(length)]
        ranks.plot([i / length for i in range(1, length + 1)], mean, style, label=label, linewidth=1.5)
        scores.plot(
            at, [100 * statistics.mean(r["metrics"][i] for r in some) for i in range(length)], style, linewidth=1.5
        )
    ranks.set_xlabel("share of the epochs")
    ranks.set_ylabel("mean effective rank")
    scores.set_xlabel("compute over dense, every epoch at the mean cost")
    scores.set_ylabel("held-out accuracy, %")
    best = max(100 * r["metrics"][-1] for r in mine)
    scores.set_ylim(best - 12, best + 1)
    figure.legend(*ranks.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=7, frameon=False)
    figure.savefig(path)
    return True
