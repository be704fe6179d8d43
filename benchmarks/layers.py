"""A training step of blocks of real widths, compiled: LOW over FULL beside the ratio of FLOPs, and where a step goes.

The floor is what a LOW step would take if its products ran at the FLOP/s of the dense ones and all else took the same:
floor = 1 − (share of products in FULL) × (1 − ratio of FLOPs).
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch._inductor.config
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

import dynrank_fx as dr
from benchmarks.measuring import DEVICE, chars
from benchmarks.result import Cell, Column, Table
from dynrank_fx.randomness import seed_all
from dynrank_fx.timing import interleaved

RANKS = (8, 4, 2)  # parts of the full rank
TIMES = (
    Column("model"),
    Column("rank"),
    Column("FULL step", "ms", ".1f"),
    Column("FULL / original", spec=".3f"),
    Column("LOW / FULL", spec=".3f"),
    Column("in FLOPs", spec=".3f"),
    Column("floor", spec=".3f"),
    Column("products alone, LOW / FULL", spec=".3f"),
    Column("of their speed-up in FLOPs", "%", ".0f"),
)
KINDS = ("products", "attention", "norms and the like", "optimizer", "other")
SHARES = (
    Column("model"),
    Column("phase"),
    Column("step", "ms", ".1f"),
    *(Column(kind, "ms", ".2f") for kind in KINDS),
    Column("attributed", "%", ".0f"),
)


@dataclass(frozen=True)
class Subject:
    """A model with an input to train on."""

    name: str
    make: Callable[[], nn.Module]
    x: Tensor


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions with batch norms, added to the input, or to a 1×1 convolution of it."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        same = inputs == outputs and stride == 1
        conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        self.shortcut: nn.Module = nn.Identity() if same else nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
        return (y + self.shortcut(x)).relu()


def resnet18() -> nn.Module:
    """ResNet-18 (arXiv 1512.03385), without its classifier."""
    widths = ((64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2))
    stem = nn.Sequential(
        nn.Conv2d(3, 64, 7, 2, padding=3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1)
    )
    stages = (block for n, m, stride in widths for block in (ResidualBlock(n, m, stride), ResidualBlock(m, m, 1)))
    return nn.Sequential(stem, *stages)


def subjects(quick: bool) -> Iterator[Subject]:
    for width in (64,) if quick else (256, 512, 1024):
        x = torch.randn(1 if quick else 4, 32 if quick else 256, width)
        yield Subject(f"transformer, 2 layers, d = {width}", lambda w=width: _layers(w), x)  # type: ignore[misc]
    if not quick:
        yield Subject("ResNet-18, 64×64, batch 16", resnet18, torch.randn(16, 3, 64, 64))
        wide = lambda: nn.Sequential(ResidualBlock(320, 320, 1))  # noqa: E731
        yield Subject("block of WRN-28-10, 320 channels, 16×16, batch 16", wide, torch.randn(16, 320, 16, 16))


def _layers(width: int) -> nn.Module:
    return nn.Sequential(*(chars.Layer(width, max(1, width // 64)) for _ in range(2)))


def layers(quick: bool) -> Table:
    """Times."""
    rows: list[tuple[Cell, ...]] = []
    for subject in subjects(quick):
        for part in RANKS[1:2] if quick else RANKS:
            original, full, low, flops = _sides(subject, part)
            same = interleaved(original, full, repeats=3 if quick else 15)
            less = interleaved(full, low, repeats=3 if quick else 15)
            before, after = (_attributed(step, 1 if quick else 5) for step in (full, low))
            share = before["products"] / sum(before.values())
            products = after["products"] / before["products"]
            floor = 1 - share * (1 - flops)
            speed_up = 100 * flops / products
            times = 1e3 * less.first, same.ratio, less.ratio
            rows.append((subject.name, f"1/{part}", *times, flops, floor, products, speed_up))
            print(*rows[-1], sep="  ", file=sys.stderr, flush=True)  # a table that is cut short is lost
    return Table(TIMES, tuple(rows), "Of forward, backward and AdamW in float32; FLOPs are those of the model.")


def shares(quick: bool) -> Table:
    """Where the time of a step goes, at a quarter of the rank."""
    rows: list[tuple[Cell, ...]] = []
    for subject in subjects(quick):
        _, full, low, _ = _sides(subject, 4)
        pair = interleaved(full, low, repeats=3 if quick else 15)
        for name, step, seconds in (("FULL", full, pair.first), ("LOW", low, pair.ratio * pair.first)):
            found = _attributed(step, 1 if quick else 5)
            known = 100 * (1 - found["other"] / max(sum(found.values()), 1e-12))
            rows.append((subject.name, name, 1e3 * seconds, *(1e3 * found[kind] for kind in KINDS), known))
            print(*rows[-1], sep="  ", file=sys.stderr, flush=True)
    note = "By torch's profiler, as own times of its events; what compiled kernels fuse counts as norms and the like."
    return Table(SHARES, tuple(rows), note)


def _sides(subject: Subject, part: int) -> tuple[Callable[[], None], Callable[[], None], Callable[[], None], float]:
    """Steps of the original, of FULL and of LOW, and the ratio of FLOPs."""
    torch._dynamo.reset()
    seed_all(0)
    model = subject.make()
    net = dr.transform(model, (subject.x,), rank=dr.Ratio(1 / part), allow_unprofitable=True)
    plan, low = dr.plan_of(net), copy.deepcopy(net)
    dr.enter_(low, dr.Phase.LOW)
    steps = [_step(each.to(DEVICE), subject.x.to(DEVICE)) for each in (model, net, low)]
    with torch._inductor.config.patch({"cpp.enable_kernel_profile": True}):  # or fused kernels are not seen
        for step in steps:
            step()
    return steps[0], steps[1], steps[2], (plan.low_flops or 0) / (plan.total_flops or 1)


def _step(model: nn.Module, x: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    forward = torch.compile(model, fullgraph=True, dynamic=False)

    def step() -> None:
        forward(x).square().mean().backward()
        with record_function("the optimizer"):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _attributed(step: Callable[[], None], times: int) -> dict[str, float]:
    """Seconds of a step by kind: own times of the profiler's events, of kernels where there is a GPU."""
    step()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (DEVICE == "cuda")
    with profile(activities=activities) as profiler:
        for _ in range(times):
            step()
    found = dict.fromkeys(KINDS, 0.0)
    for event in profiler.key_averages():
        own = event.self_device_time_total if DEVICE == "cuda" else event.self_cpu_time_total
        found[kind_of(event.key)] += own / 1e6 / times
    return found


_PARTS: Iterable[tuple[str, tuple[str, ...]]] = (
    ("optimizer", ("the optimizer", "Optimizer.", "_fused_adam", "fused_adam", "multi_tensor")),
    ("attention", ("scaled_dot_product", "flash", "fmha", "attention")),
    (
        "products",
        ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "convolution", "mkldnn", "mkl::", "mkl_", "gemm"),
    ),
    ("products", ("nvjet", "cutlass", "cublas", "splitk", "triton_tem")),  # kernels of CUDA, and those of autotuning
    ("norms and the like", ("fused", "norm", "relu", "gelu", "max_pool", "triton")),
)


def kind_of(event: str) -> str:
    """What an event of the profiler belongs to."""
    name = event.lower()
    return next((kind for kind, parts in _PARTS if any(part.lower() in name for part in parts)), "other")
