"""Query, key and value of a trained `chars` with one right factor, and with three, at equal parameters."""

from __future__ import annotations

import copy
import statistics

from torch import nn

import dynrank_fx as dr
from benchmarks.measuring import CHARS, DEVICE, chars, task_of
from benchmarks.result import Cell, Column, Table
from dynrank_fx.randomness import seed_all
from dynrank_fx.rewrite import switched_modules
from dynrank_fx.timing import interleaved
from dynrank_fx.training import Run, Settings, evaluate, fit

ATTENTION = ("*.query", "*.key", "*.value")
SEPARATE, SHARED = 32, 48  # the same number of parameters: 3 (d + d) r = (3 d + d) R
COLUMNS = (
    Column("query, key and value"),
    Column("parameters", spec=","),
    Column("error of the weights", spec=".3f"),
    Column("accuracy", "%", ".2f"),
    Column("after 3 epochs of LOW", "%", ".2f"),
    Column("LOW step", "ms", ".1f"),
    Column("ratio", spec=".3f"),
)


def shared(quick: bool) -> Table:
    seed_all(0)
    epochs = 1 if quick else chars.epochs
    net = dr.transform(chars.model(), chars.example_inputs(), include=ATTENTION, rank=dr.Fixed(SEPARATE)).to(DEVICE)
    train(net, dr.Phase.FULL, epochs)
    dense = {name: modules[0].weight.detach().clone() for name, modules in switched_modules(net).items()}
    model = dr.inline(net)
    nets = {
        "three right factors": in_low(model, SEPARATE, share=False),
        "one right factor": in_low(model, SHARED, share=True),
    }
    twins = [copy.deepcopy(each).train() for each in nets.values()]
    times = interleaved(*(CHARS.step(twin, CHARS.optimizer(twin)) for twin in twins), repeats=3 if quick else 40)
    rows: list[tuple[Cell, ...]] = []
    for (label, each), seconds in zip(nets.items(), (times.first, times.second), strict=True):
        errors = [
            float((modules[0].weight.detach() - dense[name]).norm() / dense[name].norm())
            for name, modules in switched_modules(each).items()
        ]
        before = accuracy(each)
        train(each, dr.Phase.LOW, 1 if quick else 3)
        params = sum(p.numel() for p in each.parameters())
        scores = 100 * before, 100 * accuracy(each)
        rows.append((label, params, statistics.mean(errors), *scores, 1e3 * seconds, times.ratio if rows else 1.0))
    return Table(COLUMNS, tuple(rows), f"After {epochs} dense epochs: {accuracy(model):.2%}. The rest stays dense.")


def in_low(model: nn.Module, rank: int, *, share: bool) -> nn.Module:
    """The trained model with its attention in LOW."""
    net = dr.transform(
        model,
        chars.example_inputs(),
        include=ATTENTION,
        rank=dr.Fixed(rank),
        share_inputs=share,
        allow_unprofitable=True,
    )
    dr.enter_(net, dr.Phase.LOW)
    return net


def train(net: nn.Module, phase: dr.Phase, epochs: int) -> None:
    optimizer = CHARS.optimizer(net)
    run = Run(net, optimizer, dr.schedules.always(phase), None)
    fit(run, task_of(chars), Settings(epochs=epochs, device=DEVICE))


def accuracy(module: nn.Module) -> float:
    return float(evaluate(module, task_of(chars), Settings(epochs=0, device=DEVICE))["eval_metric"] or 0)
