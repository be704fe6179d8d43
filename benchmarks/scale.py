"""What the passes cost beside the capture that they need anyway, on chains of linear layers and ReLU."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

import dynrank_fx as dr
from benchmarks.result import Column, Table
from dynrank_fx.timing import interleaved

SIZES = {dr.Capture.SYMBOLIC: (1000, 5000, 20000), dr.Capture.EXPORT: (500, 2000)}
COLUMNS = (
    Column("capture"),
    Column("nodes", spec=","),
    Column("capture alone", "s", ".2f"),
    Column("transform, with it", "s", ".2f"),
    Column("ratio", spec=".2f"),
    Column("transform, per node", "µs", ".0f"),
)


def scale(quick: bool) -> Table:
    rows = []
    dr.capture(nn.Linear(2, 2), (torch.ones(2, 2),), how=dr.Capture.EXPORT)  # it imports much the first time
    for how, sizes in SIZES.items():
        for nodes in (40,) if quick else sizes:
            model = nn.Sequential(*(layer for _ in range(nodes // 2) for layer in (nn.Linear(16, 16), nn.ReLU())))
            inputs = (torch.randn(2, 16),)
            pair = interleaved(
                partial(dr.capture, model, inputs, how=how),
                partial(dr.transform, model, inputs, rank=dr.Fixed(2), how=how),
                repeats=1 if quick or how is dr.Capture.EXPORT else 3,
                warmup=0,
            )
            per_node = 1e6 * pair.second / nodes
            rows.append((how.name.lower(), nodes, pair.first, pair.second, pair.ratio, per_node))
    return Table(COLUMNS, tuple(rows))
