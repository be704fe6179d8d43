"""Large models: `large` (training steps of a GPT) and `onnx` (dense against truncated in onnxruntime) of
`samples/measure.py`.
"""

from __future__ import annotations

import copy
import math
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gpt
import torch
from measuring import DEVICE, table
from torch import Tensor, nn

import dynrank_fx as dr
from dynrank_fx.layouts import Layout
from dynrank_fx.onnx import Precision, bound, random_inputs, session
from dynrank_fx.timing import interleaved

PROVIDER = "CUDAExecutionProvider" if DEVICE == "cuda" else "CPUExecutionProvider"


def large(quick: bool) -> None:
    """A step of the GPT under torch.compile and bfloat16 autocast, AdamW: time, and memory at its peak."""
    size = 2 if quick else gpt.BATCH
    batch = next(iter(gpt.Windows(torch.randint(256, (100_000,), dtype=torch.uint8, device=DEVICE), 1, size)))
    rows = []
    shapes = ((gpt.WIDTH, gpt.LAYERS, 0.25), (gpt.WIDTH, gpt.LAYERS, 0.125), (2048, 4, 0.25), (2048, 4, 0.125))
    for width, layers, ratio in ((64, 2, 0.25),) if quick else shapes:
        model = gpt.GPT(width, width // 64, layers)
        net = dr.transform(model, (batch[0][:2].cpu(),), rank=dr.Ratio(ratio), leave=tuple(dr.Role))
        plan = dr.plan_of(net)
        sides = {"original": model.to(DEVICE)}
        for phase in (dr.Phase.FULL, dr.Phase.LOW):
            sides[phase.name] = copy.deepcopy(net).to(DEVICE)
            dr.enter_(sides[phase.name], phase)
        steps = {name: _step(side, batch) for name, side in sides.items()}
        peaks = {name: _peak(step) for name, step in steps.items()}
        for name in ("FULL", "LOW"):
            pair = interleaved(steps["original"], steps[name], repeats=3 if quick else 20)
            share = (plan.low_flops or 0) / (plan.total_flops or 1) if name == "LOW" else 1.0
            rows.append(
                (
                    f"d = {width}, {plan.total_params / 1e6:.0f} M, rank {ratio:g}, {name}",
                    f"{pair.first * 1e3:.1f} ms",
                    f"{pair.second * 1e3:.1f} ms",
                    f"{pair.ratio:.3f}",
                    f"{share:.3f}",
                    f"{peaks['original'] / 1e9:.2f} GB",
                    f"{peaks[name] / max(peaks['original'], 1):.3f}",
                )
            )
            print(*rows[-1], sep="  ", file=sys.stderr, flush=True)  # a table that is cut short is lost
    head = ("GPT", "original step", "its step", "ratio", "ratio of FLOPs", "original's peak memory", "ratio of peaks")
    table(head, rows)


def _step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    forward = torch.compile(model, fullgraph=True, dynamic=False)

    def step() -> None:
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            loss = gpt.loss(forward(batch[0]), batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _peak(step: Callable[[], None]) -> int:
    """Bytes that a step takes at most, what the model and its optimizer hold included; 0 without a GPU."""
    if DEVICE != "cuda":
        step()
        return 0
    before = torch.cuda.memory_allocated()
    for _ in range(2):
        step()
    held = torch.cuda.memory_allocated() - before  # the optimizer's state; gradients are gone
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    step()
    return held + torch.cuda.max_memory_allocated() - base


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


def _chain(width: int) -> Subject:
    return Subject(f"4 × linear {width}", lambda: Chain(width), lambda: (torch.randn(2, width),), (1, 64, 4096), ())


def _resnet50() -> nn.Module:
    from torchvision.models import resnet50

    return resnet50(num_classes=1000)


SUBJECTS = {  # what takes longest to export first
    "bert": Subject("BERT-base", Encoder, lambda: (torch.randint(30522, (2, 128)),), (1, 32)),
    "small": Subject("4 × linear 128", lambda: Chain(128), lambda: (torch.randn(2, 128),), (1, 8), ()),
    "1024": _chain(1024),
    "2048": _chain(2048),
    "4096": _chain(4096),
    "resnet50": Subject("ResNet-50", _resnet50, lambda: (torch.randn(2, 3, 224, 224),), (1, 32)),
}


def onnx(quick: bool) -> None:
    """Dense against truncated, rank 1/4, in onnxruntime, beside the ratios of FLOPs and of bytes that must move."""
    names = ["small"] if quick else [name for name in SUBJECTS if name != "small"]
    types = [Precision.FLOAT32, Precision.FLOAT16] if PROVIDER.startswith("CUDA") or quick else [Precision.FLOAT32]
    bandwidth = _bandwidth()
    with tempfile.TemporaryDirectory() as folder:
        jobs = [(name, precision, low, folder) for name in names for precision in types for low in (False, True)]
        with multiprocessing.get_context("spawn").Pool(max(1, min(len(jobs), (os.cpu_count() or 2) - 1))) as pool:
            made = dict(zip(jobs, pool.starmap(_exported, jobs), strict=True))
        rows = []
        for name in names:
            for precision in types:
                dense, low = (made[name, precision, which, folder] for which in (False, True))
                sessions = [session(side["path"], (PROVIDER,)) for side in (dense, low)]
                for size in SUBJECTS[name].batches:
                    calls = [bound(each, random_inputs(each, size)) for each in sessions]
                    pair = interleaved(*calls, repeats=5 if quick else 40, warmup=5)
                    captured = _captured([side["path"] for side in (dense, low)], size) if size == 1 else ""
                    bits = 2 if precision is Precision.FLOAT16 else 4
                    moved = [bits * (side["params"] + size * side["values"]) for side in (dense, low)]
                    rows.append(
                        (
                            SUBJECTS[name].name,
                            precision.value,
                            size,
                            f"{pair.first * 1e3:.3f} ms",
                            f"{pair.second * 1e3:.3f} ms",
                            f"{pair.ratio:.2f}",
                            captured,
                            f"{low['flops'] / dense['flops']:.2f}",
                            f"{moved[1] / moved[0]:.2f}",
                            f"{moved[0] / bandwidth * 1e3:.3f} ms",
                        )
                    )
                    print(*rows[-1], sep="  ", file=sys.stderr, flush=True)
    print(f"{PROVIDER}, a copy moves {bandwidth / 1e9:.0f} GB/s:\n")
    head = (
        "model",
        "type",
        "batch",
        "dense",
        "truncated",
        "ratio",
        "in CUDA graphs",
        "ratio of FLOPs",
        "ratio of bytes",
    )
    table((*head, "dense at the memory floor"), rows)


def _captured(paths: Sequence[Path], size: int) -> str:
    """The times of both as CUDA graphs, and their ratio."""
    if not PROVIDER.startswith("CUDA"):
        return ""
    try:
        sessions = [session(path, ((PROVIDER, {"enable_cuda_graph": "1"}),)) for path in paths]
        pair = interleaved(*(bound(each, random_inputs(each, size)) for each in sessions), repeats=40, warmup=5)
    except Exception as error:  # onnxruntime's own, for what a graph cannot hold
        return f"no graph: {str(error)[:80]}"
    return f"{pair.first * 1e3:.3f} to {pair.second * 1e3:.3f} ms, {pair.ratio:.2f}"


def _exported(name: str, precision: Precision, low: bool, folder: str) -> dict[str, Any]:
    """The file of one side, its FLOPs for an item, and the numbers its weights' ops read and write: weights, and values
    for an item.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    subject = SUBJECTS[name]
    inputs = subject.inputs()
    net = dr.transform(subject.model().eval(), inputs, rank=dr.Ratio(0.25), leave=subject.leave)
    plan = dr.plan_of(net)
    values = 0.0
    for row in plan.sites:
        for use in row.site.uses:
            shape = use.input_shape or ()
            ops = [(use.op, row.site.shape)]
            if low:
                shapes = row.layout.factor_shapes(row.site.shape, row.rank)
                ops = [(stage, shapes[index]) for stage, index in row.layout.stages(use.op)]
            for op, weight in ops:
                out = op.output_shape(shape, weight)
                values += (torch.Size(shape).numel() + torch.Size(out).numel()) / inputs[0].shape[0]
                shape = out
    if low:
        dr.enter_(net, dr.Phase.LOW, split=_random)
    module = dr.inline(net)
    path = Path(folder) / f"{name}-{precision.value}-{low}.onnx"
    dr.export_onnx(module, inputs, path, precision=precision, batch_sizes=(1,), providers=("CPUExecutionProvider",))
    flops = plan.low_flops if low else plan.total_flops
    return {"path": path, "flops": flops, "params": sum(p.numel() for p in module.parameters()), "values": values}


def _random(names: Sequence[str], layout: Layout, weight: Tensor, rank: int) -> tuple[Tensor, ...]:
    """Random factors: what their values are makes no difference to the time."""
    shapes = layout.factor_shapes(tuple(weight.shape), rank)
    return tuple(torch.randn(shape) / math.sqrt(math.prod(shape[1:])) for shape in shapes)


def _bandwidth() -> float:
    """Bytes a second that a large copy reads and writes."""
    x = torch.empty(2**28 if DEVICE == "cuda" else 2**25, device=DEVICE)
    y = torch.empty_like(x)
    return 2 * x.nbytes / interleaved(lambda: y.copy_(x), lambda: y.copy_(x), repeats=5, inner=5).first
