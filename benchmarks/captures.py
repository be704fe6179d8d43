"""How many graphs torch.compile makes of a net, and how many more when it goes from phase to phase a hundred times.

By Dynamo's own counters. Between two switches the net trains on a whole batch and on a shorter last one, and is
evaluated on both, as in an epoch.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.optim import AdamW

import dynrank_fx as dr
from benchmarks.measuring import DEVICE, chars, digits
from benchmarks.result import Column, Table
from dynrank_fx.randomness import seed_all

SWITCHES = 100
COLUMNS = (
    Column("net"),
    Column("phase"),
    Column("what runs"),
    Column("graphs, the first time"),
    Column("graphs, over all other times"),
)


def captures(quick: bool) -> Table:
    rows = []
    switches = 6 if quick else SWITCHES
    for name, model, batch in nets(quick):
        torch._dynamo.reset()
        first, later, breaks = captured(model, batch, switches, "eager" if quick else "inductor")
        assert not breaks, f"{name} ran in parts: {breaks}"
        rows += [(name, *setting, count, later[setting]) for setting, count in first.items()]
    note = (
        f"{switches} switches between LOW and FULL, with steps of AdamW between; torch.compile(net), without options. "
        "No graph was broken."
    )
    return Table(COLUMNS, tuple(rows), note)


def nets(quick: bool) -> list[tuple[str, nn.Module, Tensor]]:
    """Each with a batch."""
    seed_all(0)
    if quick:
        conv = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16))
        return [
            ("attention", chars.Attention(16, 2), torch.randn(8, 4, 16)),
            ("convolution", conv, torch.randn(8, 8, 8, 8)),
        ]
    characters = torch.randint(chars.CHARACTERS, (8, 16))
    return [
        ("transformer", chars.CharTransformer(64, 2, 2), characters),
        ("convolutions", digits.model(), torch.randn(8, 1, 8, 8)),
    ]


def captured(
    model: nn.Module, batch: Tensor, switches: int, backend: str
) -> tuple[Counter[tuple[str, str]], Counter[tuple[str, str]], dict[str, int]]:
    """Graphs that Dynamo made by phase and what ran, the first time and later; and what broke graphs."""
    net = dr.transform(model, (batch,), rank=dr.Ratio(0.25), allow_unprofitable=True, multiple_of=1).to(DEVICE)
    optimizer = AdamW(net.parameters(), lr=1e-4)
    compiled = torch.compile(net, backend=backend)
    whole = batch.to(DEVICE)
    first, later = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    counters.clear()
    for switch in range(switches):
        phase = dr.Phase.FULL if switch % 2 else dr.Phase.LOW
        dr.enter_(net, phase, optimizer)
        for what, training, inputs in (
            ("a step", True, whole),
            ("a step on a last batch", True, whole[:5]),
            ("evaluation", False, whole),
            ("evaluation of a last batch", False, whole[:5]),
        ):
            before = counters["stats"]["unique_graphs"]
            net.train(training)
            with torch.set_grad_enabled(training):
                output = compiled(inputs)
            if training:
                output.square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            setting = phase.name, what
            (later if setting in first else first)[setting] += counters["stats"]["unique_graphs"] - before
    return first, later, dict(counters["graph_break"])
