"""What `factor_steps_` adds to a training step: a step in LOW with it and without, in turn."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch

import dynrank_fx as dr
from benchmarks.result import Column, Table
from benchmarks.study.narrower import LOW, TASKS, Cell, Run
from dynrank_fx.timing import interleaved

COLUMNS = (
    Column("width"),
    Column("rank"),
    Column("sites"),
    Column("a step in LOW", "ms", ".1f"),
    Column("with factor_steps_, over that", spec=".3f"),
)


def factor_steps(quick: bool) -> Table:
    torch.set_num_threads(1)
    rows = []
    for width in (32,) if quick else (128, 256, 512):
        run = Run.of(Cell("characters", width, 0.25, LOW, "Muon", 0, 1), TASKS["characters"])
        dr.enter_(run.net, dr.Phase.LOW)
        plain, scaled = _step(copy.deepcopy(run), scale=False), _step(run, scale=True)
        pair = interleaved(plain, scaled, repeats=3 if quick else 30)
        rows.append((width, width // 4, len(dr.plan_of(run.net).sites), 1e3 * pair.first, pair.ratio))
    note = (
        "The task of `narrower`: 2,048 characters a step; Muon for the matrices, AdamW for all else; eager, one thread."
    )
    return Table(COLUMNS, tuple(rows), note)


def _step(run: Run, *, scale: bool) -> Callable[[], None]:
    optimizers = run.optimizers(run.net)
    if scale:
        dr.factor_steps_(run.net, optimizers)
    batch = run.task.batch(torch.Generator().manual_seed(0))

    def step() -> None:
        run.task.loss(run.net, batch).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    return step
