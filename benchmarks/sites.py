"""Which sites are faster as factors, and why the others are not, in onnxruntime on the CPU.

A site is timed twice: as a part of the whole model, by onnxruntime's profile, and by itself, as ``compress`` times it
to decide. The two should agree. Weights are untrained, since what they are makes no difference to the time.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from torch import nn

import dynrank_fx as dr
from benchmarks.kernels import weight_times
from benchmarks.measuring import DIGITS
from benchmarks.result import Column, Table
from dynrank_fx.onnx import onnx_inputs, session
from dynrank_fx.plan import PlannedSite
from dynrank_fx.randomness import seed_all
from dynrank_fx.tracing import Inputs, split_inputs, with_batch

STARTING = 20
"""Microseconds of a kernel so small that starting it is most of it."""
COLUMNS = (
    Column("site"),
    Column("rank"),
    Column("dense", "µs", ".0f"),
    Column("factored", "µs", ".0f"),
    Column("ratio", spec=".2f"),
    Column("ratio, by itself", spec=".2f"),
    Column("ratio of FLOPs", spec=".2f"),
    Column("why it is not faster"),
)


@dataclass(frozen=True)
class SiteTime:
    """Microseconds of one site in the whole model, dense and factored."""

    row: PlannedSite
    dense: float
    factored: float

    @property
    def ratio(self) -> float:
        return self.factored / self.dense

    @property
    def why(self) -> str:
        """Empty where the factors are faster; otherwise what the measurement says of the reason."""
        if self.ratio < 1:
            return ""
        if self.dense < STARTING:
            return f"so little work ({self.dense:.0f} µs) that starting a second kernel costs more than it saves"
        dense, low = (
            (flops or 0) / time / 1e3
            for flops, time in ((self.row.site.flops, self.dense), (self.row.flops, self.factored))
        )
        return f"its thin stages reach {low:.0f} GFLOP/s where the dense one reaches {dense:.0f}"


def sites(quick: bool) -> Table:
    seed_all(0)
    batch = 8 if quick else 64
    inputs = with_batch(split_inputs(DIGITS.module.example_inputs()), batch)
    net = dr.transform(DIGITS.module.model(), inputs, rank=dr.Ratio(0.25), exclude=DIGITS.exclude).eval()
    alone = dr.SiteTimes(cache=None, repeats=3 if quick else 15)
    rows = []
    for time in profiled_(net, inputs, repeats=3 if quick else 20):
        row = time.row
        pair = alone.pair([row], row.rank)
        flops = row.flops / row.site.flops if row.flops and row.site.flops else None
        mine = None if pair is None else pair.ratio
        rows.append((row.site.name, row.rank, time.dense, time.factored, time.ratio, mine, flops, time.why))
    return Table(COLUMNS, tuple(rows), f"{DIGITS.name}, batch {batch}.")


def profiled_(net: nn.Module, inputs: Inputs, *, repeats: int) -> list[SiteTime]:
    """The sites of a net, timed in the files of FULL and LOW; one whose kernel cannot be told is left out.

    The net is in LOW afterwards.
    """
    plan = dr.plan_of(net)
    with tempfile.TemporaryDirectory() as folder:
        dense, small = (Path(folder) / f"{name}.onnx" for name in ("dense", "small"))
        dr.export_onnx(dr.inline(net), inputs, dense)
        dr.enter_(net, dr.Phase.LOW)
        dr.export_onnx(dr.inline(net), inputs, small)
        feed = onnx_inputs(session(dense), *inputs)
        before, after = (weight_times(path, feed, repeats=repeats) for path in (dense, small))
    times = []
    for row in plan.sites:
        holder = row.site.name.removesuffix(".weight")
        factors = [after.get(f"{holder}.{name}") for name in row.factor_names]
        known = [factor for factor in factors if factor is not None]
        if row.site.name in before and len(known) == len(factors):
            times.append(SiteTime(row, before[row.site.name], sum(known)))
    return times
