"""How long it takes to switch all sites of a net, with the state of its optimizer."""

from __future__ import annotations

import statistics
from functools import partial

import dynrank_fx as dr
from benchmarks.measuring import SAMPLES, timed
from benchmarks.result import Column, Table
from dynrank_fx.randomness import seed_all

COLUMNS = (
    Column("sample"),
    Column("FULL epoch", "s", ".2f"),
    Column("FULL to LOW", "ms", ".0f"),
    Column("LOW to FULL", "ms", ".0f"),
    Column("a switch, of an epoch", "%", ".1f"),
)


def switch(quick: bool) -> Table:
    rows = []
    for sample in SAMPLES:
        seed_all(0)
        net = sample.transformed()
        optimizer = sample.optimizer(net)
        step = sample.step(net, optimizer)
        for _ in range(3):
            step()
        epoch = statistics.median(timed(step) for _ in range(5 if quick else 20)) * len(sample.module.train_data())
        times: dict[dr.Phase, list[float]] = {dr.Phase.LOW: [], dr.Phase.FULL: []}
        for _ in range(2 if quick else 7):
            for phase, seconds in times.items():
                seconds.append(timed(partial(dr.enter_, net, phase, optimizer)))
        low, full = (statistics.median(seconds) for seconds in times.values())
        rows.append((sample.name, epoch, 1e3 * low, 1e3 * full, 100 * (low + full) / 2 / epoch))
    return Table(COLUMNS, tuple(rows))
