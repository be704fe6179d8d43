"""A training step on a batch of the samples, compiled: in FULL it should cost what the original model's costs."""

from __future__ import annotations

import copy

import dynrank_fx as dr
from benchmarks.measuring import SAMPLES
from benchmarks.result import Column, Table
from dynrank_fx.randomness import seed_all
from dynrank_fx.timing import interleaved

COLUMNS = (
    Column("sample"),
    Column("original step", "ms", ".1f"),
    Column("FULL / original", spec=".3f"),
    Column("LOW / original", spec=".2f"),
    Column("LOW / original in FLOPs", spec=".2f"),
)


def steps(quick: bool) -> Table:
    repeats = 5 if quick else 60
    rows = []
    for sample in SAMPLES:
        seed_all(0)
        full, model = sample.transformed(), sample.model()
        low, plan = copy.deepcopy(full), dr.plan_of(full)
        dr.enter_(low, dr.Phase.LOW)
        original, in_full, in_low = (sample.step(each, sample.optimizer(each)) for each in (model, full, low))
        same = interleaved(original, in_full, repeats=repeats)
        less = interleaved(original, in_low, repeats=repeats)
        flops = (plan.low_flops or 0) / (plan.total_flops or 1)
        rows.append((sample.name, 1e3 * same.first, same.ratio, less.ratio, flops))
    return Table(COLUMNS, tuple(rows))
