"""What the graph passes cost and gain: `scale` and `shared` of `samples/measure.py`."""

from __future__ import annotations

import copy
import statistics

import chars
import torch
from measuring import DEVICE, stepper, table, task_of
from torch import nn

import dynrank_fx as dr
from dynrank_fx.randomness import seed_all
from dynrank_fx.rewrite import switched_modules
from dynrank_fx.timing import interleaved
from dynrank_fx.training import Run, Settings, evaluate, fit

ATTENTION = ("*.query", "*.key", "*.value")
SEPARATE, SHARED = 32, 48  # the same number of parameters: 3 (d + d) r = (3 d + d) R


def scale(quick: bool) -> None:
    """Time of capture, and of transform with its capture, by nodes of the graph: half of them linear layers."""
    sizes = {dr.Capture.SYMBOLIC: (1000, 5000, 20000), dr.Capture.EXPORT: (500, 2000)}
    rows = []
    dr.capture(nn.Linear(2, 2), (torch.ones(2, 2),), how=dr.Capture.EXPORT)  # it imports much the first time
    for how, all_nodes in sizes.items():
        for nodes in (40,) if quick else all_nodes:
            model = nn.Sequential(*(layer for _ in range(nodes // 2) for layer in (nn.Linear(16, 16), nn.ReLU())))
            inputs = (torch.randn(2, 16),)
            pair = interleaved(
                lambda: dr.capture(model, inputs, how=how),  # noqa: B023
                lambda: dr.transform(model, inputs, rank=dr.Fixed(2), how=how),  # noqa: B023
                repeats=1 if quick or how is dr.Capture.EXPORT else 3,
                warmup=0,
            )
            row = (how.name.lower(), f"{nodes:,}", f"{pair.first:.2f} s", f"{pair.second:.2f} s", f"{pair.ratio:.2f}")
            rows.append((*row, f"{pair.second / nodes * 1e6:.0f} µs"))
    table(("capture", "nodes", "capture alone", "transform, with it", "ratio", "transform, per node"), rows)


def shared(quick: bool) -> None:
    """Query, key and value of a trained `chars` with one right factor, and with three, at equal parameters."""
    seed_all(0)
    epochs = 1 if quick else chars.epochs
    net = dr.transform(chars.model(), chars.example_inputs(), include=ATTENTION, rank=dr.Fixed(SEPARATE)).to(DEVICE)
    trained(net, dr.Phase.FULL, epochs)
    dense = {name: modules[0].weight.detach().clone() for name, modules in switched_modules(net).items()}
    model = dr.inline(net)
    nets = {
        "three right factors": made(model, SEPARATE, share=False),
        "one right factor": made(model, SHARED, share=True),
    }
    batch = [t.to(DEVICE) for t in next(iter(chars.train_data()))]
    steps = [stepper(copy.deepcopy(each).train(), chars, batch) for each in nets.values()]
    times = interleaved(*steps, repeats=3 if quick else 40)
    rows = []
    for (label, each), seconds in zip(nets.items(), (times.first, times.second), strict=True):
        errors = [
            float((modules[0].weight.detach() - dense[name]).norm() / dense[name].norm())
            for name, modules in switched_modules(each).items()
        ]
        before = accuracy(each)
        trained(each, dr.Phase.LOW, 1 if quick else 3)
        params = sum(p.numel() for p in each.parameters())
        error = f"{statistics.mean(errors):.3f}"
        row = (label, f"{params:,}", error, f"{before:.2%}", f"{accuracy(each):.2%}", f"{seconds * 1e3:.1f} ms")
        rows.append((*row, f"{times.ratio if rows else 1:.3f}"))
    print(f"chars after {epochs} dense epochs: {accuracy(model):.2%}\n")
    head = (
        "query, key and value",
        "parameters",
        "error of the weights",
        "accuracy",
        "after 3 epochs of LOW",
        "LOW step",
    )
    table((*head, "ratio"), rows)


def made(model: nn.Module, rank: int, *, share: bool) -> nn.Module:
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


def trained(net: nn.Module, phase: dr.Phase, epochs: int) -> None:
    optimizer = chars.optimizer(net.parameters())
    run = Run(net, optimizer, dr.schedules.always(phase), None)
    fit(run, task_of(chars), Settings(epochs=epochs, device=DEVICE))


def accuracy(module: nn.Module) -> float:
    return float(evaluate(module, task_of(chars), Settings(epochs=0, device=DEVICE))["eval_metric"])
