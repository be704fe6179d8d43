"""The pictures of a run's page: ranks by site as a map and as curves, spectra around switches, loss and metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

from ..phase import Phase
from ..schedules import EpochRecord
from .plots import blank_figure, colour_of, explain_shades, known, label_of, shade_phases, whole_epochs

if TYPE_CHECKING:
    from matplotlib.figure import Figure


History: TypeAlias = Sequence[EpochRecord]

_MOST_LINES, _MOST_SPECTRA = 16, 12


def rank_map(history: History, limits: Mapping[str, int]) -> Figure:
    """Effective rank over the largest possible, a row per site, a column per epoch; a dot where the site was FULL."""
    sites = list(history[0].effective_rank)
    figure = blank_figure(9, 1.6 + 0.2 * max(4, len(sites)))
    axes = figure.subplots()
    values = [[record.effective_rank[site] / limits[site] for record in history] for site in sites]
    image = axes.imshow(values, aspect="auto", cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
    for column, record in enumerate(history):
        full = [row for row, site in enumerate(sites) if record.phases[site] is Phase.FULL]
        axes.plot([column] * len(full), full, "o", markersize=2, color="white", markeredgecolor="black", linewidth=0.4)
    axes.set_yticks(range(len(sites)), [label_of(site) for site in sites], fontsize=7)
    marks = range(0, len(history), -(-len(history) // 24))
    axes.set_xticks(marks, [str(history[i].epoch + 1) for i in marks], fontsize=7)
    axes.set_xlabel(f"{history[0].unit} (a dot: the site was FULL)")
    figure.colorbar(image, ax=axes, label="effective rank / full rank")
    return figure


def rank_curves(history: History) -> Figure:
    """Effective rank of every site, and their mean, over the epochs, phases shaded."""
    figure = blank_figure(9, 4)
    axes = figure.subplots()
    sites = list(history[0].effective_rank)
    shade_phases(axes, history)
    explain_shades(figure, history)
    epochs = [record.epoch + 1 for record in history]
    for index, site in enumerate(sites):
        label = label_of(site) if len(sites) <= _MOST_LINES else None
        values = [record.effective_rank[site] for record in history]
        axes.plot(epochs, values, linewidth=1, color=colour_of(index, len(sites)), label=label)
    mean = [sum(record.effective_rank.values()) / len(sites) for record in history]
    axes.plot(epochs, mean, linewidth=2.2, color="black", label="mean")
    axes.set_xlabel(history[0].unit)
    whole_epochs(axes)
    axes.set_ylabel("effective rank")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=7, frameon=False)
    return figure


def switch_spectra(history: History) -> Figure | None:
    """Singular values before and after the last cut of each site, over the largest; None where nothing was cut."""
    cuts: dict[str, tuple[int, tuple[float, ...], tuple[float, ...]]] = {}
    for record in history:
        for site, (before, after) in record.switch_spectra.items():
            if record.phases[site] is Phase.LOW:
                cuts[site] = (record.epoch, before, after)
    if not cuts:
        return None
    shown = list(cuts.items())[:_MOST_SPECTRA]
    columns = min(4, len(shown))
    rows = -(-len(shown) // columns)
    figure = blank_figure(9, 0.6 + 1.8 * rows)
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axes, (site, (epoch, before, after)) in zip(grid.flat, shown, strict=False):
        top = before[0] or 1.0
        for values, style, label in ((before, "-", "before"), (after, "--", "after")):
            at = [(i + 1) / len(values) for i in range(len(values))]
            axes.plot(at, [max(v / top, 1e-4) for v in values], style, linewidth=1.3, label=label)
        axes.set_yscale("log")
        axes.set_title(f"{label_of(site)}, {history[0].unit} {epoch + 1}", fontsize=7)
        axes.tick_params(labelsize=6)
    for axes in list(grid.flat)[len(shown) :]:
        axes.set_visible(False)
    grid.flat[0].legend(fontsize=6, frameon=False)
    figure.supylabel("singular value over the largest", fontsize=8)
    figure.supxlabel("index, as a share of the full rank", fontsize=8)
    return figure


def losses(history: History, metric: str) -> Figure:
    """Loss and metric against epochs, against compute in dense epochs, and against time where that was measured."""
    timed = history[-1].spent_time is not None
    figure = blank_figure(12 if timed else 9, 5)
    top, low = figure.subplots(2, 3 if timed else 2, sharey="row")
    ats = [[float(record.epoch + 1) for record in history], [record.spent for record in history]]
    if timed:
        ats.append(known(record.spent_time for record in history))
    loss, eval_loss = known(record.loss for record in history), known(record.eval_loss for record in history)
    for axes, at in zip(top, ats, strict=True):
        axes.plot(at, loss, color="#333333", marker="o", markersize=2.5, label="training")
        if history[-1].eval_loss is not None:
            axes.plot(at, eval_loss, color="#c0392b", marker="s", markersize=2.5, linestyle="--", label="held out")
        axes.legend(fontsize=7, frameon=False)
    metrics = [record.metric for record in history]
    if history[-1].eval_metric is not None:
        metrics = [record.eval_metric for record in history]
    if metrics[-1] is not None:
        shares = all(value is None or 0 <= value <= 1 for value in metrics)
        percent = [(100 if shares else 1) * value for value in known(metrics)]
        low[0].set_ylabel(f"{metric}, %" if shares else metric)
        for axes, at in zip(low, ats, strict=True):
            axes.plot(at, percent, color="#c0392b", marker="s", markersize=2.5)
    for axes in (top[0], low[0]):
        shade_phases(axes, history)
        whole_epochs(axes)
    explain_shades(figure, history)
    top[0].set_ylabel("loss")
    unit = history[0].unit
    low[0].set_xlabel(unit)
    for axes, what in zip(low[1:], ("compute", "time"), strict=False):
        axes.set_xlabel(f"{what}, in {unit}s of dense training")
    return figure
