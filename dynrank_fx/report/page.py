"""A run as one self-contained HTML page: what it cost and came to, its pictures, its decisions, and every site."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .. import files
from ..errors import StoreError
from ..phase import Phase
from ..plan import Plan, PlannedSite
from ..schedules import EpochRecord
from .run_plots import losses, rank_curves, rank_map, switch_spectra

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-size: 0.9rem; }
td, th { padding: 0.25rem 0.8rem; border-bottom: 1px solid #ddd; }
th { text-align: left; } td.number { text-align: right; font-variant-numeric: tabular-nums; }
img { max-width: 100%; } .wide { overflow-x: auto; }
"""


def write_page(history: Sequence[EpochRecord], plan: Plan, path: Path, *, title: str, metric: str = "metric") -> None:
    """Write the page of a run. Raises StoreError for a run without a finished epoch, or where the disk refuses."""
    if not history:
        raise StoreError(f"{title} has no finished epoch yet: there is nothing to report")
    limits = {row.site.name: _most(row) for row in plan.sites}
    parts = [_head(title), _summary(history, plan, metric)]
    ranked = bool(history[0].effective_rank)
    if ranked:
        parts += [
            _picture("Effective rank of every site", rank_map(history, limits)),
            _picture("Effective rank over the epochs", rank_curves(history)),
        ]
    spectra = switch_spectra(history)
    if spectra is not None:
        parts.append(_picture("Spectra before and after the last cut", spectra))
    parts += [
        _picture("Loss and metric, by epochs and by compute", losses(history, metric)),
        _decisions(history),
        _sites(history, plan),
        "</body></html>\n",
    ]
    files.write_text(path, "\n".join(part for part in parts if part))


def _most(row: PlannedSite) -> int:
    """How many singular values the site's weight has, over all its groups."""
    groups, rows, columns = row.layout.to_matrix(torch.empty(row.site.shape, device="meta")).shape
    return groups * min(rows, columns)


def _head(title: str) -> str:
    name = html.escape(title)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>\n<body><h1>{name}</h1>'
    )


def _picture(title: str, figure: Figure) -> str:
    import matplotlib

    file = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "dynrank-fx"}):  # one history, one page
        figure.savefig(file, format="svg", metadata={"Date": None})
    data = base64.b64encode(file.getvalue()).decode()
    alt = html.escape(title)
    return f'<h2>{alt}</h2>\n<img alt="{alt}" src="data:image/svg+xml;base64,{data}">'


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    def cell(value: object) -> str:
        text = html.escape(str(value))
        return f'<td class="number">{text}</td>' if text[:1].isdigit() else f"<td>{text}</td>"

    lines = ["".join(f"<th>{html.escape(name)}</th>" for name in head)]
    lines += ["".join(cell(value) for value in row) for row in rows]
    return '<div class="wide"><table>' + "".join(f"<tr>{line}</tr>\n" for line in lines) + "</table></div>"


def _summary(history: Sequence[EpochRecord], plan: Plan, metric: str) -> str:
    last, epochs = history[-1], len(history)
    rows: list[tuple[str, str]] = [
        ("epochs", str(epochs)),
        ("training compute, of as many dense epochs", f"{last.spent / epochs:.1%}"),
        ("training time", f"{sum(record.seconds or 0 for record in history):.0f} s"),
        ("time of a step, median of the last epoch", f"{1e3 * (last.step_seconds or 0):.1f} ms"),
        ("parameters, dense", f"{plan.total_params:,}"),
        ("parameters, truncated", f"{plan.low_params:,} ({plan.low_params / max(plan.total_params, 1):.1%})"),
    ]
    if plan.total_flops and plan.low_flops is not None:
        rows.append(("FLOPs, truncated over dense", f"{plan.low_flops / plan.total_flops:.1%}"))
    if last.memory:
        peak = max(record.memory["peak"] for record in history)
        rows.append(("peak memory", f"{peak / 1e6:,.0f} MB"))
        rows.append(("parameters, buffers and optimizer state, last", f"{last.memory['state'] / 1e6:,.1f} MB"))
    figures = (
        ("training loss", last.loss, ".4f"),
        ("held-out loss", last.eval_loss, ".4f"),
        (f"held-out {metric}", last.eval_metric, ".2%"),
        (f"held-out {metric} after truncation", last.truncated.get("eval_metric"), ".2%"),
    )
    rows += [(what, format(value, form)) for what, value, form in figures if value is not None]
    return "<h2>What it came to</h2>\n" + _table(("", ""), rows)


def _decisions(history: Sequence[EpochRecord]) -> str:
    """A line per epoch at which something switched, or was decided otherwise than before."""
    rows, before = [], ""
    for record in history:
        if record.switch_error or record.phase != before:
            errors = [error for site, error in record.switch_error.items() if record.phases[site] is Phase.LOW]
            lost = f"moves weights by up to {max(errors):.2g} of their norm" if errors else ""
            rows.append((record.epoch + 1, record.phase, lost, "; ".join(record.reasons)))
        before = record.phase
    return "<h2>Switches and decisions</h2>\n" + _table(("epoch", "phase", "the cut", "why"), rows)


def _sites(history: Sequence[EpochRecord], plan: Plan) -> str:
    first, last = history[0], history[-1]
    errors: dict[str, float] = {}
    for record in history:
        errors |= {site: e for site, e in record.switch_error.items() if record.phases[site] is Phase.LOW}
    rows = []
    for row in plan.sites:
        name = row.site.name
        ranks = [f"{record.effective_rank[name]:.1f}" if record.effective_rank else "" for record in (first, last)]
        stable = f"{last.stable_rank[name]:.1f}" if last.stable_rank else ""
        shape, error = "×".join(map(str, row.site.shape)), errors.get(name)
        rank = last.ranks.get(name, row.rank)
        lost = "" if error is None else f"{error:.1%}"
        rows.append((name, shape, row.layout.name, rank, last.phases[name].name, *ranks, stable, lost))
    head = (
        "site",
        "shape",
        "layout",
        "rank",
        "phase",
        "effective rank, first",
        "last",
        "stable rank",
        "error of the last cut",
    )
    table = "<h2>Sites</h2>\n" + _table(head, rows)
    if plan.skipped:
        left = [(s.name, "×".join(map(str, s.shape)), s.reason) for s in plan.skipped]
        table += "\n<h2>What stays dense</h2>\n" + _table(("weight", "shape", "why"), left)
    return table
