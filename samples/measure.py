"""The figures of the README, measured: `python samples/measure.py` for all, or name parts of it.

Parts: steps, switch, memory, peak, truncation, startup, scale, shared, onnx, and large, which runs unasked on a GPU
alone. Each prints a Markdown table. Both sides of a ratio are timed in turn in one run; ratios are medians. `--quick`
does less of everything, to see that it runs.
"""

from __future__ import annotations

import copy
import statistics
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType

import chars
import digits
import measure_large
import measure_passes
import torch
from measuring import DEVICE, stepper, table, timed
from torch import Tensor, nn

import dynrank_fx as dr
from dynrank_fx.layouts import svd
from dynrank_fx.randomness import seed_all
from dynrank_fx.timing import interleaved, machine
from dynrank_fx.tracing import Net

SAMPLES: tuple[tuple[str, ModuleType, tuple[str, ...]], ...] = (
    ("digits", digits, ("stem*", "*shortcut*", "head")),
    ("chars", chars, ("embed",)),
)


def main(parts: Sequence[str], *, quick: bool = False) -> None:
    known: dict[str, Callable[[bool], None]] = {
        "steps": steps,
        "switch": switch,
        "memory": memory,
        "peak": peak,
        "truncation": truncation,
        "startup": startup,
        "scale": measure_passes.scale,
        "shared": measure_passes.shared,
        "large": measure_large.large,
        "onnx": measure_large.onnx,
    }
    print(f"{machine()}\n")
    for name in parts or [name for name in known if name != "large" or DEVICE == "cuda" or quick]:
        if name not in known:
            sys.exit(f"there is no part {name!r}; choose from {', '.join(known)}")
        known[name](quick)
        print()


def transformed(sample: ModuleType, exclude: tuple[str, ...]) -> Net:
    batch = next(iter(sample.train_data()))
    return dr.transform(sample.model(), (batch[0],), rank=dr.Ratio(0.25), exclude=exclude).to(DEVICE)


def steps(quick: bool) -> None:
    """Step time: FULL against the original model, and LOW against dense beside the ratio of their FLOPs."""
    rows = []
    for name, sample, exclude in SAMPLES:
        seed_all(0)
        batch = [t.to(DEVICE) for t in next(iter(sample.train_data()))]
        full = transformed(sample, exclude)
        low, plan = copy.deepcopy(full), dr.plan_of(full)
        dr.enter_(low, dr.Phase.LOW)
        original = stepper(sample.model().to(DEVICE), sample, batch)
        repeats = 5 if quick else 60
        same = interleaved(original, stepper(full, sample, batch), repeats=repeats)
        less = interleaved(original, stepper(low, sample, batch), repeats=repeats)
        flops = (plan.low_flops or 0) / (plan.total_flops or 1)
        rows.append((name, f"{same.first * 1e3:.1f} ms", f"{same.ratio:.3f}", f"{less.ratio:.2f}", f"{flops:.2f}"))
    table(("sample", "original step", "FULL / original", "LOW / original", "LOW / original in FLOPs"), rows)


def switch(quick: bool) -> None:
    """Time of a switch with its optimizer state, against an epoch."""
    rows = []
    for name, sample, exclude in SAMPLES:
        seed_all(0)
        batches = list(sample.train_data())
        batch = [t.to(DEVICE) for t in batches[0]]
        net = transformed(sample, exclude)
        step = stepper(net, sample, batch)
        for _ in range(3):
            step()
        full_step = statistics.median(timed(step) for _ in range(5 if quick else 20))
        times: dict[dr.Phase, list[float]] = {dr.Phase.LOW: [], dr.Phase.FULL: []}
        for _ in range(2 if quick else 7):
            for phase, seconds in times.items():
                seconds.append(timed(partial(dr.enter_, net, phase, step.optimizer)))  # type: ignore[attr-defined]
        epoch = full_step * len(batches)
        low, full = (statistics.median(seconds) for seconds in times.values())
        rows.append(
            (name, f"{epoch:.2f} s", f"{low * 1e3:.0f} ms", f"{full * 1e3:.0f} ms", f"{(low + full) / 2 / epoch:.1%}")
        )
    table(("sample", "FULL epoch", "FULL to LOW", "LOW to FULL", "a switch, in epochs"), rows)


def memory(quick: bool) -> None:
    """Bytes of parameters, gradients and optimizer state, against those of the original, beside the parameters'
    ratio.
    """
    rows = []
    for name, sample, exclude in SAMPLES:
        seed_all(0)
        batch = [t.to(DEVICE) for t in next(iter(sample.train_data()))]
        net = transformed(sample, exclude)
        plan = dr.plan_of(net)
        dense = held_bytes(sample.model().to(DEVICE), sample, batch)
        full = held_bytes(net, sample, batch)
        dr.enter_(net, dr.Phase.LOW)
        low = held_bytes(net, sample, batch)
        ideal = plan.low_params / plan.total_params
        rows.append((name, f"{dense / 1e6:.2f} MB", f"{full / dense:.3f}", f"{low / dense:.3f}", f"{ideal:.3f}"))
    table(("sample", "original", "FULL / original", "LOW / original", "ideal for LOW"), rows)


def held_bytes(model: nn.Module, sample: ModuleType, batch: list[Tensor]) -> int:
    optimizer = sample.optimizer(model.parameters())
    sample.loss(model(batch[0]), batch).backward()
    optimizer.step()
    tensors = [t for p in model.parameters() for t in (p, p.grad) if t is not None]
    tensors += [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    total = sum(t.nbytes for t in tensors)
    optimizer.zero_grad()
    return total


_PEAK = """
import re, sys, torch
from torch import nn
import dynrank_fx as dr
layers, width, device = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
net = dr.transform(model, (torch.zeros(2, width),)).to(device)
del model
optimizer = torch.optim.AdamW(net.parameters())
def peak():
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1e3
def restart():
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        open("/proc/self/clear_refs", "w").write("5")
for to in (dr.Phase.LOW, dr.Phase.FULL, dr.Phase.LOW):
    net(torch.zeros(2, width, device=device)).sum().backward()
    optimizer.step(); optimizer.zero_grad()
    restart(); before = peak()
    dr.enter_(net, to, optimizer)
    highest = peak()
    restart()
    print(to.name, before, highest, peak())
"""


def peak(quick: bool) -> None:
    """Peak memory of a switch beside the states before and after it, in a process of its own, AdamW state included."""
    layers, width = (4, 512) if quick else (24, 2048)
    command = [sys.executable, "-c", _PEAK, str(layers), str(width), DEVICE]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    site = 4 * width * width / 1e6
    rows = []
    for line, label in zip(lines, ("FULL to LOW", "LOW to FULL", "FULL to LOW again"), strict=True):
        before, highest, after = map(float, line.split()[1:])
        extra = highest - max(before, after)
        rows.append((label, f"{before:.0f} MB", f"{highest:.0f} MB", f"{after:.0f} MB", f"{extra / site:.1f}"))
    print(f"{layers} linear layers of {width}×{width} ({site:.0f} MB each), AdamW:\n")
    table(("switch", "before", "peak", "after", "peak over the larger, in weights of one site"), rows)


def truncation(quick: bool) -> None:
    """Truncated SVD of random matrices to a quarter of their rank: time and error against torch.linalg.svd."""
    shapes = ((256, 256), (512, 128)) if quick else ((1024, 1024), (4096, 1024), (2048, 2048))
    rows = []
    for m, n in shapes:
        torch.manual_seed(0)
        # A trained weight's spectrum falls; this one by a factor of 30 over its length.
        W = torch.randn(m, n, device=DEVICE) / n**0.5
        W = (
            W
            @ torch.diag(torch.logspace(0, -1.5, n, device=DEVICE))
            @ torch.linalg.qr(torch.randn(n, n, device=DEVICE)).Q
        )
        rank = min(m, n) // 4
        pair = interleaved(
            lambda W=W: torch.linalg.svd(W, full_matrices=False),  # type: ignore[misc]
            lambda W=W, rank=rank: svd.truncate(W[None], rank),  # type: ignore[misc]
            repeats=2 if quick else 7,
            warmup=1,
        )
        B, A = svd.truncate(W[None], rank)
        best = torch.linalg.svdvals(W.double())[rank:].norm()
        excess = float((W.double() - B[0].double() @ A[0].double()).norm() / best - 1)
        rows.append(
            (
                f"{m}×{n}",
                rank,
                f"{pair.first * 1e3:.0f} ms",
                f"{pair.second * 1e3:.0f} ms",
                f"{1 / pair.ratio:.1f}×",
                f"{excess:.1e}",
            )
        )
    table(("matrix", "rank", "torch.linalg.svd", "ours", "faster", "error over the optimum"), rows)


def startup(quick: bool) -> None:
    """Time of `dynrank-fx --help`, as a process."""
    command = [str(Path(sysconfig.get_path("scripts")) / "dynrank-fx"), "--help"]
    run = lambda: subprocess.run(command, check=True, capture_output=True)  # noqa: E731
    run()
    median = statistics.median(timed(run) for _ in range(3 if quick else 15))
    table(("command", "median"), [("dynrank-fx --help", f"{median * 1e3:.0f} ms")])


if __name__ == "__main__":
    given = sys.argv[1:]
    main([part for part in given if part != "--quick"], quick="--quick" in given)
