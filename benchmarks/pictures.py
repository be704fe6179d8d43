"""The three pictures of the page of findings, from the files of results: `python benchmarks/pictures.py`."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script finds its own folder; the benchmarks are a package

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.result import load
from benchmarks.study.narrower import DENSE, LOW, SCALED, kept

HERE = Path(__file__).parent
IMAGES = HERE.parent / "docs/images"
SIZE, DPI = (8, 4.2), 110
BEST_AROUND = 4.0
"""The rate that was best for the dense model with Muon at rank 1/4 and widths 128 and 256, where several were run."""


def main(folder: Path = IMAGES) -> None:
    """Draw all of them into a folder."""
    for name, draw in {"narrower": _narrower, "cut": _cut, "step-times": _step_times}.items():
        figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")
        draw(figure.subplots())
        figure.savefig(folder / f"{name}.png")


def _narrower(axes: Axes) -> None:
    """The held-out loss of LOW alone above that of the narrower dense model, each at its best learning rate. Only where
    more than one was tried for the dense one, or the one that was best in the settings around it; and those say so.
    """
    rows = list(kept().values())
    settings = sorted({_setting(row) for row in rows if _is_tuned(row, _rates(rows, _setting(row), DENSE))})
    for way, style, label in ((LOW, "o", "LOW alone"), (SCALED, "D", "with steps in the measure of the product")):
        points = [
            (_best(mine, way, seed) - _best(mine, DENSE, seed), at)
            for at, setting in enumerate(settings)
            for mine in [[row for row in rows if _setting(row) == setting]]
            for seed in _seeds(mine, way)
        ]
        axes.plot(*zip(*points, strict=True), style, color="C0" if way == LOW else "C2", label=label)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(settings)), [_said(rows, setting) for setting in settings], fontsize=7)
    axes.invert_yaxis()
    axes.margins(y=0.2)
    axes.legend(fontsize=8, frameon=False)
    axes.set_xlabel("held-out loss above that of the narrower dense model of equal FLOPs")
    axes.set_title("A narrower dense model is what to beat (left of the line: LOW wins)", fontsize=10)


def _rates(rows: Iterable[dict[str, Any]], setting: tuple[str, int, float, int, str], way: str) -> set[float]:
    return {row["rate"] for row in rows if _setting(row) == setting and row["way"] == way}


def _is_tuned(row: dict[str, Any], rates: set[float]) -> bool:
    return len(rates) > 1 or (row["optimizer"] == "Muon" and rates == {BEST_AROUND})


def _setting(row: dict[str, Any]) -> tuple[str, int, float, int, str]:
    return row["task"], row["width"], row["rank"], row["length"], row["optimizer"]


def _said(rows: Iterable[dict[str, Any]], setting: tuple[str, int, float, int, str]) -> str:
    task, width, rank, length, optimizer = setting
    once = "" if len(_rates(rows, setting, DENSE)) > 1 else ", one rate"
    return f"{task}, width {width}, rank {round(rank * width)},\n{length:,} steps, {optimizer}{once}"


def _seeds(rows: Iterable[dict[str, Any]], way: str) -> Sequence[int]:
    """Those that this way and the dense one were run with."""
    mine, dense = ({row["seed"] for row in rows if row["way"] == each} for each in (way, DENSE))
    return sorted(mine & dense)


def _best(rows: Iterable[dict[str, Any]], way: str, seed: int) -> float:
    return min(float(row["loss"]) for row in rows if (row["way"], row["seed"]) == (way, seed))


def _cut(axes: Axes) -> None:
    """What a dense-trained network keeps of its accuracy when `compress` cuts it."""
    table = load(HERE / "results/cutting.json").table
    rows: list[dict[str, Any]] = [
        dict(zip([column.name for column in table.columns], row, strict=True)) for row in table.rows
    ]
    names = {
        "digits-conv": "digits, convolutions",
        "digits-vit": "digits, transformer",
        "chars-64": "characters, transformer",
    }
    for index, (network, name) in enumerate(names.items()):
        mine = [row for row in rows if (row["network"], row["training"]) == (network, "dense")]
        for way, style in (("budget", "--o"), ("+ 100 steps", "-o")):
            axes.plot(
                [1.0, *(float(row["share of parameters"]) for row in reversed(mine))],
                [0.0, *(float(row[way]) - float(row["not cut"]) for row in reversed(mine))],
                style,
                color=f"C{index}",
                markersize=4,
                label=f"{name}{', + 100 steps' if way != 'budget' else ''}",
            )
    table = load(HERE / "results/pitch.json").table
    points: list[Sequence[Any]] = [
        row for row in table.rows if "narrower" not in str(row[0]) and "recovery" not in str(row[0])
    ]
    axes.plot(
        [row[3] for row in points],
        [row[1] - points[0][1] for row in points],
        "--o",
        color="C3",
        markersize=4,
        label="published pitch tracker, convolutions",
    )
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xlabel("parameters after the cut, of the dense model")
    axes.set_ylabel("accuracy lost, points")
    axes.set_ylim(-45, 3)
    axes.legend(fontsize=8, frameon=False)
    axes.set_title("What a cut costs a trained model depends on whether its weights use their rank", fontsize=10)


def _step_times(axes: Axes) -> None:
    """Time of a LOW step over a FULL one beside the same ratio of FLOPs."""
    table = load(HERE / "results/layers.json").table
    rows: list[Sequence[Any]] = list(table.rows)
    for index, model in enumerate(dict.fromkeys(row[0] for row in rows)):
        mine = [row for row in rows if row[0] == model]
        axes.plot(
            [row[5] for row in mine], [row[4] for row in mine], "-o", color=f"C{index}", markersize=4, label=model
        )
    axes.plot([0.1, 1], [0.1, 1], color="black", linewidth=0.8)
    axes.set_xlabel("FLOPs of a LOW step, over FULL (ranks 1/8, 1/4, 1/2)")
    axes.set_ylabel("its time, over FULL")
    axes.legend(fontsize=8, frameon=False)
    axes.set_title("Time follows FLOPs (the line) the better, the wider the layers", fontsize=10)


if __name__ == "__main__":
    main()
