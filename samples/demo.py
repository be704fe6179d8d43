"""The whole main job on scikit-learn's digits: plan, train LOW and FULL, truncate, export, check, compare, draw.

Run by `make demo`; every figure it prints is measured in the run.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import digits
from torch import nn

import dynrank_fx as dr
from dynrank_fx.onnx import bench_onnx, onnx_machine
from dynrank_fx.plan import Plan
from dynrank_fx.randomness import seed_all
from dynrank_fx.report import plot_run
from dynrank_fx.schedules import Schedule
from dynrank_fx.text import text_table
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
    fit(
        run,
        task(),
        Settings(epochs=epochs, compile=compiled),
        watcher=Bar(epochs, len(digits.train_data()), "accuracy"),
    )
    return run


def task() -> Task:
    return Task(digits.train_data(), digits.loss, lambda batch: ((batch[0],), {}), digits.eval_data(), digits.metric)


@dataclass(frozen=True)
class Side:
    """One of the two models that are compared. flops: of one example."""

    file: Path
    params: int
    flops: int
    accuracy: float


def export(module: nn.Module, path: Path, flops: int | None) -> Side:
    """The ONNX file of a model, checked in onnxruntime, with its accuracy there."""
    print(dr.export_onnx(module, batch(2), path))
    params = sum(parameter.numel() for parameter in module.parameters())
    accuracy = evaluate(module, task(), Settings(epochs=0))["eval_metric"]
    return Side(path, params, (flops or 0) // 64, accuracy or 0.0)


def compared(dense: Side, small: Side) -> str:
    """Size, work, latency and accuracy of both; latencies as `dynrank-fx bench` measures them, in turn."""
    sizes = [side.file.stat().st_size for side in (dense, small)]
    rows = [
        ("parameters", f"{dense.params:,}", f"{small.params:,}", f"{small.params / dense.params:.2f}x"),
        ("FLOPs per example", f"{dense.flops:,}", f"{small.flops:,}", f"{small.flops / dense.flops:.2f}x"),
        ("ONNX file", f"{sizes[0] / 1e3:,.0f} kB", f"{sizes[1] / 1e3:,.0f} kB", f"{sizes[1] / sizes[0]:.2f}x"),
    ]
    timings = bench_onnx(small.file, dense.file, batch_sizes=(1, 64), repeats=40)
    for after, before in zip(timings[::2], timings[1::2], strict=True):
        times = f"{1e3 * before.median:.2f} ms", f"{1e3 * after.median:.2f} ms", f"{after.ratio:.2f}x"
        rows.append((f"latency, batch {after.batch}", *times))
    points = 100 * (small.accuracy - dense.accuracy)
    rows.append(("accuracy", f"{dense.accuracy:.2%}", f"{small.accuracy:.2%}", f"{points:+.2f} points"))
    table = text_table(("", "dense", "truncated", "truncated / dense"), rows, right=(1, 2, 3))
    return f"{table}\nlatency: medians of runs in turn, {timings[0].provider}; {onnx_machine()}"


def sites_compared(plan: Plan) -> str:
    """Each site by itself in onnxruntime on the CPU, dense and factored, as `dynrank-fx compress` times it."""
    times = dr.SiteTimes(cache=None)
    rows, slow = [], 0
    for row in plan.sites:
        pair = times.pair([row], row.rank)
        if pair is None or not (row.flops and row.site.flops):
            continue
        slow += pair.ratio >= 1
        both = f"{1e6 * pair.first:.0f}", f"{1e6 * pair.second:.0f}", f"{1 / pair.ratio:.2f}x"
        rows.append((row.site.name, str(row.rank), *both, f"{row.flops / row.site.flops:.2f}"))
    head = ("site", "rank", "dense µs", "factored µs", "speed-up", "FLOPs ratio")
    verdict = f"{slow} of {len(rows)} sites are not faster" if slow else "every site is faster"
    return f"{text_table(head, rows, right=range(1, 6))}\nper site at batch 64, each by itself: {verdict}"


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
    print(compared(dense, small))
    print(f"\n{sites_compared(plan)}")

    plot_run(run.history, out / "ranks.png")
    print(f"\ndrew {out / 'ranks.png'}; the whole demo took {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo-out"), *map(int, sys.argv[2:3]))
