"""Peak memory and time of the verbs, over the size of a Llama-shaped model.

Every row is measured in a process of its own. That process builds the model, does the same once to a tiny one (so that
nothing is left to import or to compile), gives freed memory back to the system, and notes its resident memory; the
kernel's mark of the highest resident memory is then reset (``5`` written to /proc/self/clear_refs) and read again after
the call (VmHWM). Peaks are what stands above the start, in weights of the model: at 1.0 a second copy of them all was
there at some moment. Other processes disturb the times, not the peaks.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dynrank_fx as dr
from benchmarks.result import Column, Table

VOCABULARY, TIME = 1024, 16
RANK = dr.Ratio(0.25)


@dataclasses.dataclass(frozen=True)
class Shape:
    """Of a model."""

    layers: int
    width: int
    hidden: int
    dtype: str = "float32"


SHAPES = {
    "tiny": Shape(2, 64, 176),
    "0.15 B": Shape(12, 1024, 2816),
    "0.6 B": Shape(12, 2048, 5632),
    "1.1 B": Shape(22, 2048, 5632),
    "1.1 B, bfloat16": Shape(22, 2048, 5632, "bfloat16"),
}


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (each(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(_turned(q, cos, sin), _turned(k, cos, sin), v, is_causal=True)
        return self.o(mixed.transpose(1, 2).flatten(2))


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


class Layer(nn.Module):
    def __init__(self, width: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.norm, self.attention = nn.RMSNorm(width), Attention(width, heads)
        self.norm2, self.gate, self.up = nn.RMSNorm(width), *(nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x), cos, sin)
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Llama(nn.Module):
    """Tokens [batch, time] to scores [batch, time, VOCABULARY]; a small vocabulary, so that the layers count."""

    cos: Tensor
    sin: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        heads = max(shape.width // 64, 1)
        self.embed = nn.Embedding(VOCABULARY, shape.width)
        self.layers = nn.ModuleList(Layer(shape.width, shape.hidden, heads) for _ in range(shape.layers))
        self.norm, self.head = nn.RMSNorm(shape.width), nn.Linear(shape.width, VOCABULARY, bias=False)
        size = shape.width // heads
        angles = torch.outer(torch.arange(512.0), 10000.0 ** (-torch.arange(0, size, 2) / size)).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        cos, sin = self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.head(self.norm(x))


def example() -> tuple[Tensor, ...]:
    """Few tokens: the activations of a run come on top of the weights."""
    return (torch.arange(TIME)[None] * 7 % VOCABULARY,)


def batches() -> list[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randint(VOCABULARY, (8, TIME), generator=generator),) for _ in range(4)]


# What is measured: each function builds what is there at the start and returns the call. What the call returns is kept
# alive until its peak has been read.

Call = Callable[[], Any]


def build(shape: Shape) -> nn.Module:
    torch.manual_seed(0)
    with torch.device("meta"):  # no float32 copy of a bfloat16 model
        model = Llama(shape).to(getattr(torch, shape.dtype))
    model.to_empty(device="cpu")
    fresh = Llama(dataclasses.replace(shape, layers=0))
    model.cos, model.sin = (b.to(model.cos.dtype) for b in (fresh.cos, fresh.sin))
    for parameter in model.parameters():
        nn.init.ones_(parameter) if parameter.ndim < 2 else nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model.eval()


def transform(shape: Shape, folder: Path, **options: Any) -> Call:
    model = build(shape)
    return lambda: (model, dr.transform(model, example(), rank=RANK, **options))


def _net(shape: Shape, phase: dr.Phase) -> nn.Module:
    net = dr.transform(build(shape), example(), rank=RANK)
    dr.enter_(net, phase)
    return net


def enter_low(shape: Shape, folder: Path) -> Call:
    net = _net(shape, dr.Phase.FULL)
    return lambda: (dr.enter_(net, dr.Phase.LOW), net)


def enter_full(shape: Shape, folder: Path) -> Call:
    net = _net(shape, dr.Phase.LOW)
    return lambda: (dr.enter_(net, dr.Phase.FULL), net)


def truncate_low(shape: Shape, folder: Path) -> Call:
    net = _net(shape, dr.Phase.LOW)
    return lambda: (net, dr.truncate(net))


def truncate_full(shape: Shape, folder: Path) -> Call:
    net, data = _net(shape, dr.Phase.FULL), batches()
    return lambda: (net, dr.truncate(net, data))


def compress(shape: Shape, folder: Path) -> Call:
    model, data = build(shape), batches()
    return lambda: (model, dr.compress(model, example(), dr.Ratio(0.25), data))


def export_dense(shape: Shape, folder: Path) -> Call:
    model = build(shape)
    return lambda: (model, dr.export_onnx(model, example(), folder / "model.onnx"))


def export_outside(shape: Shape, folder: Path) -> Call:
    model = build(shape)
    return lambda: (model, dr.export_onnx(model, example(), folder / "model.onnx", external_data=True))


def export_low(shape: Shape, folder: Path) -> Call:
    net = _net(shape, dr.Phase.LOW)
    return lambda: (net, dr.export_onnx(net, example(), folder / "model.onnx"))


def save(shape: Shape, folder: Path) -> Call:
    net = _net(shape, dr.Phase.FULL)
    return lambda: dr.save(net, folder / "saved")


def load(shape: Shape, folder: Path) -> Call:
    dr.save(_net(shape, dr.Phase.FULL), folder / "saved")
    model = build(shape)
    return lambda: (model, dr.load(folder / "saved", model))


ROWS: dict[str, Callable[[Shape, Path], Call]] = {
    "transform": transform,
    "transform, copy=False": lambda *at: transform(*at, copy=False),
    "transform by torch.export": lambda *at: transform(*at, how=dr.Capture.EXPORT),
    "transform by torch.export, copy=False": lambda *at: transform(*at, how=dr.Capture.EXPORT, copy=False),
    "transform module by module": lambda *at: transform(*at, how=dr.Capture.MODULES),
    "enter_ FULL to LOW": enter_low,
    "enter_ LOW to FULL": enter_full,
    "truncate in LOW": truncate_low,
    "export_onnx of the dense model": export_dense,
    "export_onnx of the dense model, external_data=True": export_outside,
    "export_onnx in LOW": export_low,
    "save": save,
    "load": load,
    "truncate in FULL, calibrated": truncate_full,
    "compress to a quarter of the rank": compress,
}
SLOW = ("truncate in FULL, calibrated", "compress to a quarter of the rank")  # measured at the least size only


# One row, in a process of its own


@dataclasses.dataclass(frozen=True)
class Row:
    """weights: bytes of the model's. peak, after: bytes above the start, at most and when the call has returned."""

    weights: int
    peak: int
    after: int
    seconds: float


def measured(what: str, size: str) -> Row:
    """In this process, which has done nothing else."""
    shape = SHAPES[size]
    weights = sum(p.numel() for p in _on_meta(shape).parameters()) * getattr(torch, shape.dtype).itemsize
    with tempfile.TemporaryDirectory() as folder:
        for name in ("tiny", "real"):
            Path(folder, name).mkdir()
        ROWS[what](dataclasses.replace(SHAPES["tiny"], dtype=shape.dtype), Path(folder, "tiny"))()
        call = ROWS[what](shape, Path(folder, "real"))
        _give_back()
        before = _resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        started = time.perf_counter()
        kept = call()
        seconds = time.perf_counter() - started
        peak = _resident("VmHWM") - before
        _give_back()
        after = _resident("VmRSS") - before
        del kept
    return Row(weights, peak, after, seconds)


def _on_meta(shape: Shape) -> Llama:
    with torch.device("meta"):
        return Llama(shape)


def _give_back() -> None:
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def _resident(what: str) -> int:
    """Bytes of this process, now (VmRSS) or at most (VmHWM)."""
    found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


# All rows

COLUMNS = (
    Column("call"),
    Column("size"),
    Column("weights", "GB", ".2f"),
    Column("peak above the start", "× weights", ".2f"),
    Column("left afterwards", "× weights", ".2f"),
    Column("time", "s", ".1f"),
)
NOTE = (
    "Each row in a process of its own, by its resident memory; what a call returns is left afterwards, and what it "
    "frees is counted as negative. float32; the example is one row of 16 tokens, and the activations of more come on "
    "top (64 tokens: 0.1 of the weights at 0.15 B)."
)


def memory(quick: bool) -> Table:
    rows = []
    for size in ("tiny",) if quick else ("0.15 B", "0.6 B", "1.1 B"):
        for name in ROWS:
            if name in SLOW and size not in ("tiny", "0.15 B"):
                continue
            row = _apart(name, size)
            shares: tuple[float | None, ...] = (None,) * 4
            if row is not None:
                shares = (row.weights / 1e9, row.peak / row.weights, row.after / row.weights, row.seconds)
            rows.append((name, size, *shares))
    return Table(COLUMNS, tuple(rows), NOTE)


def _apart(name: str, size: str) -> Row | None:
    """The row from a process of its own. None where that failed, for its memory perhaps; stderr says why."""
    command = [sys.executable, "-m", "benchmarks.memory", name, size]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    if done.returncode:
        why = done.stderr.strip().splitlines() or [f"the process ended with {done.returncode}"]
        print(f"{name} at {size}: {why[-1]}", file=sys.stderr)
        return None
    return Row(**json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    print(json.dumps(dataclasses.asdict(measured(*sys.argv[1:]))))
