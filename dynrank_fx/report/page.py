"""A run as one self-contained HTML page: what it cost and came to, its pictures, its decisions, and every site."""

from __future__ import annotations

import base64
import html
import io
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .. import files
from ..errors import StoreError
from ..phase import Phase
from ..plan import Plan, PlannedSite
from ..schedules import EpochRecord
from .plots import thinned
from .run_plots import losses, rank_curves, rank_map, switch_spectra

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_SWITCHES = 100  # at the start and at the end of a run
_TIMED = "the same in time, as measured when the plan was made"
_SITE, _BLANK = "\0", "\1"  # what stands for a site and a figure: they occur in no sentence
_FIGURE = re.compile(r"(?<![\w.])\d+(?:\.\d+)?%?")
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-size: 0.9rem; }
td, th { padding: 0.25rem 0.8rem; border-bottom: 1px solid #ddd; }
th { text-align: left; } td { min-width: 3.5rem; } td.number { text-align: right; font-variant-numeric: tabular-nums; }
img { max-width: 100%; } .wide { overflow-x: auto; }
"""


@dataclass(frozen=True)
class About:
    """What is known of a run beside its history.

    Attributes:
        epochs: How many epochs it will have; None where that is not known.
        metric: What the metric is called.
        facts: More of it, such as its schedule, seed and versions, by what they are.
        dense: The history of a run of the dense model to compare with, and that run's name; None without one.
        then: The command to go on with, or "".
    """

    epochs: int | None = None
    metric: str = "metric"
    facts: Mapping[str, str] = field(default_factory=dict)
    dense: tuple[str, Sequence[EpochRecord]] | None = None
    then: str = ""


def write_page(
    history: Sequence[EpochRecord], plan: Plan, path: Path, *, title: str, about: About | None = None
) -> None:
    """Write the page of a run. Raises StoreError for a run without a finished epoch, or where the disk refuses."""
    if not history:
        raise StoreError(f"{title} has no finished epoch yet: there is nothing to report")
    about = about or About()
    shown = thinned(history)
    limits = {row.site.name: _most(row) for row in plan.sites}
    parts = [
        _head(title),
        _opening(history, plan, about),
        _summary(history, plan, about.metric),
        _left_out(history, shown),
    ]
    ranked = bool(history[0].effective_rank)
    if ranked:
        parts += [
            _picture("Effective rank of every site", rank_map(shown, limits)),
            _picture(f"Effective rank over the {history[0].unit}s", rank_curves(shown)),
        ]
    spectra = switch_spectra(history)
    if spectra is not None:
        parts.append(_picture("Spectra before and after the last cut", spectra))
    parts += [
        _picture(f"Loss and metric, by {_axes(history)}", losses(shown, about.metric)),
        _decisions(history),
        _sites(history, plan, limits),
        _facts(about),
        "</body></html>\n",
    ]
    files.write_text(path, "\n".join(part for part in parts if part))


def verdict(history: Sequence[EpochRecord], plan: Plan, about: About) -> list[str]:
    """What the run cost, what it reached, and how that is beside dense training, in a sentence each."""
    last, done = history[-1], len(history)
    of = f" of {about.epochs}" if about.epochs is not None and about.epochs != done else ""
    what = "what dense training costs in as many"
    if last.spent_time is not None:
        what = f"the FLOPs of dense training in as many, and {last.spent_time / done:.1%} of its time, as measured"
    sentences = [f"{done}{of} {last.unit}{'s' if done > 1 else ''} cost {last.spent / done:.1%} of {what}."]
    small = f"{plan.low_params / max(plan.total_params, 1):.1%} of the dense model's parameters"
    reached, cut = _reached(history), last.truncated.get("eval_metric")
    if reached is not None and reached == cut:  # all sites are in LOW
        sentences.append(f"The held-out {about.metric} is {score(reached)}, with {small}.")
    elif reached is not None and cut is not None:
        sentences.append(
            f"The held-out {about.metric} is {score(reached)}, and {score(cut)} once all sites are cut to {small}."
        )
    elif reached is not None:
        sentences.append(f"The held-out {about.metric} is {score(reached)}; cut, the model has {small}.")
    else:
        loss = last.loss if last.eval_loss is None else last.eval_loss
        which = "training" if last.eval_loss is None else "held-out"
        sentences.append(
            f"The {which} loss is {'unknown' if loss is None else f'{loss:.4f}'}; cut, the model has {small}."
        )
    return [*sentences, _beside_dense(reached if cut is None else cut, about)]


def _beside_dense(reached: float | None, about: About) -> str:
    if about.dense is None:
        return "How dense training does is not known here: train with --schedule full, and give that run by --against."
    name, history = about.dense
    dense = _reached(history) if history else None
    if dense is None or reached is None:
        return f"{name} has no held-out {about.metric} to compare with."
    gap = reached - dense
    points = f"{100 * abs(gap):.2f} points" if 0 <= min(reached, dense) <= max(reached, dense) <= 1 else score(abs(gap))
    more = "as much" if score(reached) == score(dense) else f"{points} {'more' if gap > 0 else 'less'}"
    epochs = f"{len(history)} {history[0].unit}{'s' if len(history) > 1 else ''}"
    return f"The dense run ({name}) reached {score(dense)} in {epochs}: this one has {more}."


def _reached(history: Sequence[EpochRecord]) -> float | None:
    """The metric on held-out data at the end."""
    return history[-1].eval_metric


def score(value: float) -> str:
    """A share in percent, and any other metric as a number."""
    return f"{value:.2%}" if 0 <= value <= 1 else f"{value:.4g}"


def _opening(history: Sequence[EpochRecord], plan: Plan, about: About) -> str:
    said = html.escape(" ".join(verdict(history, plan, about)))
    then = f"<p>Next: <code>{html.escape(about.then)}</code></p>" if about.then else ""
    return f"<p><strong>{said}</strong></p>\n{then}"


def _facts(about: About) -> str:
    return "<h2>How it was made</h2>\n" + _table(("", ""), about.facts.items()) if about.facts else ""


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


def time_share(history: Sequence[EpochRecord]) -> float | None:
    """What the steps took, over what as many would have taken with every site in FULL; None where no epoch tells."""
    full = [record.step_seconds for record in history if set(record.phases.values()) == {Phase.FULL}]
    known = [each for each in full if each]
    took = [(record.step_seconds, record.steps) for record in history if record.step_seconds and record.steps]
    if not known or len(took) < len(history):
        return None
    return sum(each * steps for each, steps in took) / (statistics.median(known) * sum(steps for _, steps in took))


def _axes(history: Sequence[EpochRecord]) -> str:
    unit = history[0].unit
    return f"{unit}s and by compute" if history[-1].spent_time is None else f"{unit}s, compute and measured time"


def _summary(history: Sequence[EpochRecord], plan: Plan, metric: str) -> str:
    last, epochs, share = history[-1], len(history), time_share(history)
    rows: list[tuple[str, str]] = [
        (f"{last.unit}s", str(epochs)),
        (f"training compute, of as many dense {last.unit}s", f"{last.spent / epochs:.1%}"),
        *([] if last.spent_time is None else [(_TIMED, f"{last.spent_time / epochs:.1%}")]),
        *([] if share is None else [("time of the steps, of as many in FULL", f"{share:.1%}")]),
        ("training time", f"{sum(record.seconds or 0 for record in history):.0f} s"),
        (f"time of a step, median of the last {last.unit}", f"{1e3 * (last.step_seconds or 0):.1f} ms"),
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
    )
    rows += [(what, format(value, form)) for what, value, form in figures if value is not None]
    scores = (
        (f"held-out {metric}", last.eval_metric),
        (f"held-out {metric} after truncation", last.truncated.get("eval_metric")),
    )
    rows += [(what, score(value)) for what, value in scores if value is not None]
    return "<h2>What it came to</h2>\n" + _table(("", ""), rows)


def _left_out(history: Sequence[EpochRecord], shown: Sequence[EpochRecord]) -> str:
    """What the pictures do not show."""
    if len(shown) == len(history):
        return ""
    return f"<p>The pictures show {len(shown)} of the {len(history):,} {history[0].unit}s, evenly spread.</p>"


def _decisions(history: Sequence[EpochRecord]) -> str:
    """A line per epoch at which something switched, or was decided otherwise than before."""
    told, before = [], ""
    for record in history:
        if record.switch_error or record.phase != before:
            told.append(record)
        before = record.phase
    said = ""
    if len(told) > 2 * _MOST_SWITCHES:
        between = len(told) - 2 * _MOST_SWITCHES
        said = f"<p>The first and the last {_MOST_SWITCHES}; {between:,} between them are in history.jsonl.</p>\n"
        told = told[:_MOST_SWITCHES] + told[-_MOST_SWITCHES:]
    rows = []
    for record in told:
        errors = [error for site, error in record.switch_error.items() if record.phases[site] is Phase.LOW]
        lost = f"moves weights by up to {max(errors):.2g} of their norm" if errors else ""
        rows.append((record.epoch + 1, record.phase, lost, "; ".join(grouped(record.reasons, record.phases))))
    return "<h2>Switches and decisions</h2>\n" + said + _table((history[0].unit, "phase", "the cut", "why"), rows)


def grouped(reasons: Sequence[str], sites: Iterable[str]) -> list[str]:
    """Reasons that are the same but for the site and its figures as one, which names how many and between what."""
    names = sorted(sites, key=len, reverse=True)
    site = re.compile("|".join(map(re.escape, names)) or r"(?!)")
    groups: dict[str, list[tuple[str, list[str]]]] = {}
    for reason in reasons:
        found = site.search(reason)
        name, rest = (found[0], site.sub(_SITE, reason, count=1)) if found else ("", reason)
        groups.setdefault(_FIGURE.sub(_BLANK, rest) if found else rest, []).append((name, _FIGURE.findall(rest)))
    said = []
    for template, members in groups.items():
        which = [name for name, _ in members]
        text = template
        for values in zip(*(values for _, values in members), strict=True):
            text = text.replace(_BLANK, _between(values), 1)
        if len(members) == 1:
            said.append(text.replace(_SITE, which[0]))
        else:
            listed = ", ".join(which[:4]) + (f" and {len(which) - 4} more" if len(which) > 4 else "")
            said.append(f"{text.replace(_SITE, f'each of {len(which)} sites')} ({listed})")
    return said


def _between(values: Sequence[str]) -> str:
    ordered = sorted(values, key=lambda text: float(text.rstrip("%")))
    return ordered[0] if ordered[0] == ordered[-1] else f"{ordered[0]} to {ordered[-1]}"


def judged(effective: float, phase: Phase, rank: int) -> str:
    """What an effective rank says of a site: in LOW whether its rank is used, else whether a cut to it takes much."""
    if phase is Phase.LOW:
        share = effective / max(rank, 1)
        return f"rank {rank} is {'used up' if share > 0.9 else 'used' if share >= 0.5 else 'more than enough'}"
    return f"fits into rank {rank}" if effective <= rank else f"needs more than rank {rank}"


def _sites(history: Sequence[EpochRecord], plan: Plan, limits: Mapping[str, int]) -> str:
    first, last = history[0], history[-1]
    errors: dict[str, float] = {}
    for record in history:
        errors |= {site: e for site, e in record.switch_error.items() if record.phases[site] is Phase.LOW}
    rows = []
    for row in plan.sites:
        name = row.site.name
        ranks = [f"{record.effective_rank[name]:.1f}" if record.effective_rank else "" for record in (first, last)]
        full, phase = limits[name], last.phases[name]
        groups = max(1, full // max(row.layout.max_rank(row.site.shape), 1))
        rank = last.ranks.get(name, row.rank)
        said = judged(last.effective_rank[name], phase, groups * rank) if last.effective_rank else ""
        stable = f"{last.stable_rank[name]:.1f}" if last.stable_rank else ""
        shape, error = "×".join(map(str, row.site.shape)), errors.get(name)
        lost = "" if error is None else f"{error:.1%}"
        rows.append((name, shape, row.layout.name, rank, full, phase.name, *ranks, said, stable, lost))
    head = (
        "site",
        "shape",
        "layout",
        "rank",
        "full rank",
        "phase",
        "effective rank, first",
        "last",
        "which says",
        "stable rank",
        "error of the last cut",
    )
    table = "<h2>Sites</h2>\n" + _table(head, rows)
    if plan.skipped:
        left = [(s.name, "×".join(map(str, s.shape)), s.reason) for s in plan.skipped]
        table += "\n<h2>What stays dense</h2>\n" + _table(("weight", "shape", "why"), left)
    return table
