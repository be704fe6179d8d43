"""Pictures: effective rank and loss over the epochs with the phases shaded, and spectra."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .. import files
from ..errors import DynrankError
from ..phase import Phase
from ..schedules import EpochRecord
from ..text import printable
from .matrices import MatrixRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


MOST_EPOCHS = 300  # in a picture of some 900 dots
_LEGEND_LINE = 0.16  # inches: a legend higher than its axes would leave them no room
_LABEL = 60  # characters
_SHADE = {Phase.FULL: "#f2c14e", Phase.LOW: "#dbe6f0", Phase.ADAPTOR: "#c9b6de"}


def plot_run(history: Sequence[EpochRecord], path: Path) -> None:
    """Effective rank of every site, and loss with the held-out metric, over the epochs of a run, thinned if many."""
    history, count = thinned(history), len(history)
    figure = blank_figure(9, max(7, 2 * _LEGEND_LINE * len(history[0].effective_rank)))
    ranks, losses = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    epochs = [record.epoch + 1 for record in history]
    shade_phases(ranks, history)
    shade_phases(losses, history)
    explain_shades(figure, history)
    for index, site in enumerate(history[0].effective_rank):
        ranks.plot(
            epochs,
            [record.effective_rank[site] for record in history],
            marker="o",
            markersize=3,
            linewidth=1.4,
            color=colour_of(index, len(history[0].effective_rank)),
            label=label_of(site),
        )
    ranks.set_ylabel("effective rank")
    ranks.set_title("Effective rank of each site")
    if ranks.lines:
        ranks.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=7, frameon=False)
    loss = known(record.loss for record in history)
    losses.plot(epochs, loss, color="#333333", marker="o", markersize=3, label="loss")
    losses.set_ylabel("training loss")
    of = f" ({len(history)} of {count:,} are shown, evenly spread)" if len(history) < count else ""
    losses.set_xlabel(f"{history[0].unit}{of}")
    whole_epochs(losses)
    if history[-1].eval_metric is not None:
        metric = losses.twinx()
        values = [100 * value for value in known(record.eval_metric for record in history)]
        metric.plot(epochs, values, color="#c0392b", marker="s", markersize=3, linestyle="--")
        metric.set_ylabel("held-out metric, %", color="#c0392b")
    _save(figure, path)


def plot_spectra(rows: Sequence[MatrixRow], path: Path) -> None:
    """Singular values of every matrix over their largest, against the share of their number."""
    if not rows:
        raise DynrankError("there is no matrix whose spectrum could be drawn")
    figure = blank_figure(9, max(5, _LEGEND_LINE * len(rows)))
    axes = figure.subplots()
    for index, row in enumerate(rows):
        top = row.spectrum[0] or 1.0
        count = len(row.spectrum)
        axes.plot(
            [(i + 1) / count for i in range(count)],
            [max(value / top, 1e-4) for value in row.spectrum],
            linewidth=1.2,
            color=colour_of(index, len(rows)),
            label=f"{label_of(row.name)} ({row.effective_rank:.0f} of {count})",
        )
    axes.set_yscale("log")
    axes.set_xlabel("index of the singular value, as a share of their number")
    axes.set_ylabel("singular value over the largest")
    axes.set_title("Spectra (in brackets: effective rank of the number of singular values)")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=7, frameon=False)
    _save(figure, path)


def thinned(history: Sequence[EpochRecord]) -> Sequence[EpochRecord]:
    """As many of them as a picture can show, evenly spread; the first and the last are among them."""
    if len(history) <= MOST_EPOCHS:
        return history
    return [history[round(i * (len(history) - 1) / (MOST_EPOCHS - 1))] for i in range(MOST_EPOCHS)]


def shade_phases(axes: Axes, history: Sequence[EpochRecord]) -> None:
    """One band per epoch that is shown, so that an epoch of mixed phases is a blend of both colours."""
    ends = [*(record.epoch for record in history[1:]), history[-1].epoch + 1]
    for record, end in zip(history, ends, strict=True):
        phases = list(record.phases.values())
        for phase, colour in _SHADE.items():
            share = phases.count(phase) / max(len(phases), 1)
            axes.axvspan(record.epoch + 0.5, end + 0.5, color=colour, alpha=0.5 * share, linewidth=0)
    axes.set_xlim(history[0].epoch + 0.5, history[-1].epoch + 1.5)


def whole_epochs(axes: Axes) -> None:
    """No marks between two epochs."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))


def explain_shades(figure: Figure, history: Sequence[EpochRecord]) -> None:
    """A legend of the phases that the run has."""
    from matplotlib.patches import Patch

    seen = {phase for record in history for phase in record.phases.values()}
    bands = [
        Patch(color=c, alpha=0.5, label=f"{phase.name} {history[0].unit}s")
        for phase, c in _SHADE.items()
        if phase in seen
    ]
    figure.legend(handles=bands, loc="outside upper right", fontsize=8, frameon=False, ncols=3)


def known(values: Iterable[float | None]) -> list[float]:
    """The values, with a gap in a line where one is not known."""
    return [math.nan if value is None else value for value in values]


def label_of(name: str) -> str:
    """What a site is called in a picture, where a long name would leave no room."""
    label = printable(name.removesuffix(".weight"))
    return label if len(label) <= _LABEL else f"{label[: _LABEL // 2]}…{label[-_LABEL // 2 :]}"


def colour_of(index: int, count: int) -> object:
    """The colour of one line of many."""
    import matplotlib

    return matplotlib.colormaps["viridis"](index / max(count - 1, 1) * 0.9)


def blank_figure(width: float, height: float) -> Figure:
    """A figure of so many inches. Raises DynrankError where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure  # not pyplot: it keeps global state and wants a screen
    except ImportError as error:
        raise DynrankError("pictures need matplotlib: pip install 'dynrank-fx[plot]'") from error
    return Figure(figsize=(width, height), layout="constrained", dpi=130)


def _save(figure: Figure, path: Path) -> None:
    suffix = path.suffix.lstrip(".").lower() or "png"
    if suffix not in figure.canvas.get_supported_filetypes():
        raise DynrankError(
            f"a picture cannot be written as {path.suffix!r}: give a name that ends in .png, .svg or .pdf"
        )
    with files.replacing(path) as beside:
        figure.savefig(beside, format=suffix)
