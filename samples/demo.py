"""The whole main job on scikit-learn's digits: plan, train LOW and FULL, truncate, export, check, compare, draw.

Run by `make demo`; every figure it prints is measured in the run.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import digits
from torch import nn

import dynrank_fx as dr
from dynrank_fx.onnx.compare import Side, compare
from dynrank_fx.randomness import seed_all
from dynrank_fx.report import plot_run
from dynrank_fx.schedules import Schedule
from dynrank_fx.tracing import Inputs, Net, split_inputs, with_batch
from dynrank_fx.training import Bar, Run, Settings, Task, evaluate, fit


def transformed(seed: int = 0) -> Net:
    """The digits network with switchable sites; costs in the plan are for a batch of 64."""
    seed_all(seed)
    # The stem, the 1×1 shortcuts and the classifier stay dense, as in the paper's own experiments.
    return dr.transform(digits.model(), batch(64), rank=dr.Ratio(0.25), exclude=["stem*", "*shortcut*", "head"])


def batch(size: int) -> Inputs:
    return with_batch(split_inputs(digits.example_inputs()), size)


def trained(net: Net, schedule: Schedule, epochs: int, *, compiled: bool) -> Run:
    """The net after training by the schedule, and how it went."""
    optimizer = digits.optimizer(net.parameters())
    run = Run(net, optimizer, schedule, digits.lr_scheduler(optimizer))
    fit(run, task(), Settings(epochs=epochs, compile=compiled), watcher=Bar(epochs, len(digits.train_data())))
    return run


def task() -> Task:
    return Task(digits.train_data(), digits.loss, lambda batch: ((batch[0],), {}), digits.eval_data(), digits.metric)


def export(module: nn.Module, path: Path, flops: int | None) -> Side:
    """The ONNX file of a model, checked in onnxruntime, with its accuracy there."""
    print(dr.export_onnx(module, batch(2), path))
    params = sum(parameter.numel() for parameter in module.parameters())
    accuracy = evaluate(module, task(), Settings(epochs=0))["eval_metric"]
    return Side(path, params, (flops or 0) // 64, accuracy)


def main(out: Path, epochs: int = digits.epochs, compiled: bool = True) -> None:
    started = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    decays = [milestone for milestone in digits.MILESTONES if milestone < epochs] or [epochs - 1]

    print("1. The plan: which weights are factored, and what that saves on a batch of 64")
    net = transformed()
    plan = dr.plan_of(net)
    print(plan)

    print("\n2. Train in LOW and FULL phases, the FULL ones around the first decay of the learning rate")
    run = trained(net, dr.schedules.aligned(epochs, decays), epochs, compiled=compiled)

    print("\n3. The same network trained dense for as many epochs, to compare with")
    dense_run = trained(transformed(), dr.schedules.always(dr.Phase.FULL), epochs, compiled=compiled)

    print("\n4. Truncate, export to ONNX, and compare with PyTorch in onnxruntime")
    small = export(dr.truncate(run.net), out / "truncated.onnx", plan.low_flops)
    dense = export(dr.inline(dense_run.net.eval()), out / "dense.onnx", plan.total_flops)

    print("\n5. Dense against truncated")
    print(compare(dense, small, batch(64), plan))

    plot_run(run.history, out / "ranks.png")
    print(f"\ndrew {out / 'ranks.png'}; the whole demo took {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo-out"), *map(int, sys.argv[2:3]))
