"""Dense against truncated: parameters, FLOPs, file size, latency and accuracy, and the layers where factoring is not
faster.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..plan import Plan, PlannedSite
from ..text import text_table
from ..timing import Pair, interleaved, machine, weight_times
from ..tracing import Inputs, batch_size, with_batch
from .agreement import onnx_inputs
from .session import session


@dataclass(frozen=True)
class SiteTime:
    """Microseconds of one site in onnxruntime, dense and factored, with the GFLOP/s each reached."""

    row: PlannedSite
    dense: float
    factored: float
    batch: int

    @property
    def faster(self) -> float:
        return self.dense / self.factored

    @property
    def why(self) -> str:
        """Empty where the factors are faster; otherwise what the measurement says of the reason."""
        if self.faster > 1:
            return ""
        dense, low = self._rate(self.row.site.flops, self.dense), self._rate(self.row.flops, self.factored)
        if self.dense < 20:
            return f"so little work ({self.dense:.0f} µs) that starting a second kernel costs more than it saves"
        return f"its two thin stages reach {low:.0f} GFLOP/s where the dense one reaches {dense:.0f}"

    def _rate(self, flops: int | None, microseconds: float) -> float:
        return (flops or 0) / microseconds / 1e3


@dataclass(frozen=True)
class Side:
    """One of the two models: its file, its numbers, and the metric it reaches."""

    path: Path
    params: int
    flops: int
    metric: float | None = None


@dataclass(frozen=True)
class Comparison:
    """What ``compare`` measured. latency: by batch size, (dense, truncated, ratio) in seconds. sites: at the largest
    batch.
    """

    dense: Side
    small: Side
    latency: Mapping[int, Pair]
    sites: tuple[SiteTime, ...]
    provider: str
    machine: str

    def __str__(self) -> str:
        rows = [
            (
                "parameters",
                f"{self.dense.params:,}",
                f"{self.small.params:,}",
                _ratio(self.small.params, self.dense.params),
            ),
            (
                "FLOPs per example",
                f"{self.dense.flops:,}",
                f"{self.small.flops:,}",
                _ratio(self.small.flops, self.dense.flops),
            ),
        ]
        sizes = [side.path.stat().st_size for side in (self.dense, self.small)]
        rows.append(("ONNX file", f"{sizes[0] / 1e3:,.0f} kB", f"{sizes[1] / 1e3:,.0f} kB", _ratio(sizes[1], sizes[0])))
        for batch, pair in self.latency.items():
            times = f"{pair.first * 1e3:.2f} ms", f"{pair.second * 1e3:.2f} ms"
            rows.append((f"latency, batch {batch}", *times, f"{pair.ratio:.2f}x"))
        if self.dense.metric is not None and self.small.metric is not None:
            points = 100 * (self.small.metric - self.dense.metric)
            rows.append(("accuracy", f"{self.dense.metric:.2%}", f"{self.small.metric:.2%}", f"{points:+.2f} points"))
        lines = [text_table(("", "dense", "truncated", "truncated / dense"), rows, right=(1, 2, 3))]
        lines.append(f"latency: medians of runs in turn, onnxruntime {self.provider}; {self.machine}")
        if self.sites:
            lines += ["", self._site_table()]
        return "\n".join(lines)

    def _site_table(self) -> str:
        rows = []
        for time in self.sites:
            site, flops = time.row.site, time.row.flops
            share = f"{flops / site.flops:.2f}" if flops and site.flops else ""
            rows.append(
                (
                    site.name,
                    str(time.row.rank),
                    f"{time.dense:.0f}",
                    f"{time.factored:.0f}",
                    f"{time.faster:.2f}x",
                    share,
                    time.why,
                )
            )
        head = ("site", "rank", "dense µs", "factored µs", "speed-up", "FLOPs ratio", "why it is not faster")
        slow = sum(1 for time in self.sites if time.why)
        verdict = f"{slow} of {len(self.sites)} sites are not faster" if slow else "every site is faster"
        batch = self.sites[0].batch
        return (
            text_table(head, rows, right=(1, 2, 3, 4, 5))
            + f"\nper site at batch {batch}, by onnxruntime's profile: {verdict}"
        )


def compare(dense: Side, small: Side, inputs: Inputs, plan: Plan, *, batches: tuple[int, ...] = (1, 64)) -> Comparison:
    """Measure two ONNX files of one model against each other, in turn, at several batch sizes.

    inputs: example inputs, of the same dtypes and trailing shapes. plan: what was factored, with costs for those
    inputs.
    """
    sessions = [session(side.path) for side in (dense, small)]
    latency = {batch: _latency(sessions, with_batch(inputs, batch, seed=batch), batch) for batch in batches}
    counted = batch_size(inputs) or 1
    feed = onnx_inputs(sessions[0], *with_batch(inputs, counted, seed=0))
    sites = _site_times(dense.path, small.path, feed, plan, counted)
    return Comparison(dense, small, latency, sites, sessions[0].get_providers()[0], machine())


def _latency(sessions: list[Any], inputs: Inputs, batch: int) -> Pair:
    runs = [partial(one.run, None, onnx_inputs(one, *inputs)) for one in sessions]
    return interleaved(runs[0], runs[1], repeats=40, inner=max(1, 16 // batch))


def _site_times(dense: Path, small: Path, feed: dict[str, Any], plan: Plan, batch: int) -> tuple[SiteTime, ...]:
    before, after = weight_times(dense, feed), weight_times(small, feed)
    times = []
    for row in plan.sites:
        holder = row.site.name.removesuffix(".weight")
        factors = [after.get(f"{holder}.{name}") for name in row.factor_names]
        if row.site.name in before and all(factor is not None for factor in factors):
            times.append(SiteTime(row, before[row.site.name], sum(f for f in factors if f is not None), batch))
    return tuple(times)


def _ratio(small: float, dense: float) -> str:
    return f"{small / dense:.2f}x"
