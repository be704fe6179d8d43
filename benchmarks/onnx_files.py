"""ONNX files of models dense and truncated to rank 1/4, in turn in onnxruntime: where do factors pay?

Weights are random, since what they are makes no difference to the time. Every file is exported by a process of its own.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import dynrank_fx as dr
from benchmarks.measuring import DEVICE
from benchmarks.result import Cell, Column, Table
from dynrank_fx.layouts import Layout
from dynrank_fx.onnx import Precision, bound, random_inputs, session
from dynrank_fx.plan import Plan
from dynrank_fx.timing import Pair, interleaved

PROVIDER = "CUDAExecutionProvider" if DEVICE == "cuda" else "CPUExecutionProvider"
COLUMNS = (
    Column("model"),
    Column("type"),
    Column("batch"),
    Column("dense", "ms", ".3f"),
    Column("truncated", "ms", ".3f"),
    Column("ratio", spec=".2f"),
    Column("dense as CUDA graph", "ms", ".3f"),
    Column("truncated as CUDA graph", "ms", ".3f"),
    Column("ratio as CUDA graphs", spec=".2f"),
    Column("ratio of FLOPs", spec=".2f"),
    Column("ratio of bytes", spec=".2f"),
    Column("dense at the memory floor", "ms", ".3f"),
)


@dataclass(frozen=True)
class Subject:
    """What is exported and timed: a model, one example, the batch sizes."""

    name: str
    model: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    batches: tuple[int, ...]
    leave: tuple[dr.Role, ...] = tuple(dr.Role)


class Chain(nn.Module):
    """Four square layers with ReLU between, [batch, width] to the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x


class Encoder(nn.Module):
    """BERT-base in size: 12 layers of width 768 with 12 heads and 3072 inside, [batch, 128] tokens to their states."""

    def __init__(self, width: int = 768, layers: int = 12) -> None:
        super().__init__()
        self.embed = nn.Embedding(30522, width)
        layer = nn.TransformerEncoderLayer(width, 12, 4 * width, activation="gelu", batch_first=True, dropout=0.0)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layers(self.embed(tokens))


def chain(width: int) -> Subject:
    return Subject(f"4 × linear {width}", lambda: Chain(width), lambda: (torch.randn(2, width),), (1, 64, 4096), ())


def resnet50_model() -> nn.Module:
    from torchvision.models import resnet50

    return resnet50(num_classes=1000)


SUBJECTS = {  # what takes longest to export first
    "bert": Subject("BERT-base", Encoder, lambda: (torch.randint(30522, (2, 128)),), (1, 32)),
    "small": Subject("4 × linear 128", lambda: Chain(128), lambda: (torch.randn(2, 128),), (1, 8), ()),
    "1024": chain(1024),
    "2048": chain(2048),
    "4096": chain(4096),
    "resnet50": Subject("ResNet-50", resnet50_model, lambda: (torch.randn(2, 3, 224, 224),), (1, 32)),
}


@dataclass(frozen=True)
class File:
    """One side. flops: for an item. params: numbers in its weights. values: numbers that the operations of the weights
    read and write besides, for an item.
    """

    path: Path
    flops: int
    params: int
    values: float

    def moved(self, precision: Precision, batch: int) -> float:
        """Bytes that a run must move at least."""
        return (2 if precision is Precision.FLOAT16 else 4) * (self.params + batch * self.values)


def onnx(quick: bool) -> Table:
    names = ["small"] if quick else [name for name in SUBJECTS if name != "small"]
    types = [Precision.FLOAT32, Precision.FLOAT16] if PROVIDER.startswith("CUDA") or quick else [Precision.FLOAT32]
    bandwidth = copied_per_second()
    rows: list[tuple[Cell, ...]] = []
    with tempfile.TemporaryDirectory() as folder:
        jobs = [(name, precision, low, folder) for name in names for precision in types for low in (False, True)]
        with multiprocessing.get_context("spawn").Pool(max(1, min(len(jobs), (os.cpu_count() or 2) - 1))) as pool:
            made = dict(zip(jobs, pool.starmap(exported, jobs), strict=True))
        for name in names:
            for precision in types:
                dense, low = (made[name, precision, which, folder] for which in (False, True))
                for size in SUBJECTS[name].batches:
                    pair = in_turn((dense.path, low.path), size, repeats=5 if quick else 40)
                    graphs = as_cuda_graphs((dense.path, low.path), size) if size == 1 else None
                    moved = dense.moved(precision, size), low.moved(precision, size)
                    times = 1e3 * pair.first, 1e3 * pair.second, pair.ratio
                    captured = (1e3 * graphs.first, 1e3 * graphs.second, graphs.ratio) if graphs else (None, None, None)
                    bounds = low.flops / dense.flops, moved[1] / moved[0], 1e3 * moved[0] / bandwidth
                    rows.append((SUBJECTS[name].name, precision.value, size, *times, *captured, *bounds))
                    print(*rows[-1], sep="  ", file=sys.stderr, flush=True)  # a table that is cut short is lost
    return Table(COLUMNS, tuple(rows), f"{PROVIDER}; a copy moves {bandwidth / 1e9:.0f} GB/s.")


def in_turn(paths: Sequence[Path], size: int, *, repeats: int, settings: dict[str, str] | None = None) -> Pair:
    """Two files at a batch size. settings: of the provider."""
    sessions = [session(path, ((PROVIDER, settings or {}),)) for path in paths]
    first, second = (bound(each, random_inputs(each, size)) for each in sessions)
    return interleaved(first, second, repeats=repeats, warmup=5)


def as_cuda_graphs(paths: Sequence[Path], size: int) -> Pair | None:
    """The same where kernels are launched as one graph; None without a GPU, and for what a graph cannot hold."""
    if not PROVIDER.startswith("CUDA"):
        return None
    try:
        return in_turn(paths, size, repeats=40, settings={"enable_cuda_graph": "1"})
    except Exception as error:  # onnxruntime's own
        print(f"{paths[0].name}: no CUDA graph: {error}", file=sys.stderr)
        return None


def exported(name: str, precision: Precision, low: bool, folder: str) -> File:
    """One side of a subject, as a file."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    subject = SUBJECTS[name]
    inputs = subject.inputs()
    net = dr.transform(subject.model().eval(), inputs, rank=dr.Ratio(0.25), leave=subject.leave)
    plan = dr.plan_of(net)
    if low:
        dr.enter_(net, dr.Phase.LOW, split=random_factors)
    module = dr.inline(net)
    path = Path(folder) / f"{name}-{precision.value}-{low}.onnx"
    dr.export_onnx(module, inputs, path, precision=precision, batch_sizes=(1,), providers=("CPUExecutionProvider",))
    flops = (plan.low_flops if low else plan.total_flops) or 0
    return File(path, flops, sum(p.numel() for p in module.parameters()), values(plan, low) / inputs[0].shape[0])


def values(plan: Plan, low: bool) -> float:
    """The numbers that the operations of the sites read and write beside their weights."""
    total = 0
    for row in plan.sites:
        for use in row.site.uses:
            shape = use.input_shape or ()
            ops = [(use.op, row.site.shape)]
            if low:
                shapes = row.layout.factor_shapes(row.site.shape, row.rank)
                ops = [(stage, shapes[index]) for stage, index in row.layout.stages(use.op, row.rank)]
            for op, weight in ops:
                out = op.output_shape(shape, weight)
                total += math.prod(shape) + math.prod(out)
                shape = out
    return total


def random_factors(names: Sequence[str], layout: Layout, weight: Tensor, rank: int) -> tuple[Tensor, ...]:
    """In place of an SVD, which takes long."""
    shapes = layout.factor_shapes(tuple(weight.shape), rank)
    return tuple(torch.randn(shape) / math.sqrt(math.prod(shape[1:])) for shape in shapes)


def copied_per_second() -> float:
    """Bytes a second that a large copy reads and writes."""
    x = torch.empty(2**28 if DEVICE == "cuda" else 2**25, device=DEVICE)
    y = torch.empty_like(x)
    return 2 * x.nbytes / interleaved(lambda: y.copy_(x), lambda: y.copy_(x), repeats=5, inner=5).first
