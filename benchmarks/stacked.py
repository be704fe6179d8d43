"""Right factors of sites that read one input, stacked into one product: ONNX files, and a prototype of a training step.

Weights are random, since what they are makes no difference to the time.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dynrank_fx as dr
from benchmarks.measuring import DEVICE
from benchmarks.onnx_files import PROVIDER, random_factors
from benchmarks.result import Cell, Column, Table
from dynrank_fx.onnx import bound, session
from dynrank_fx.randomness import seed_all
from dynrank_fx.timing import interleaved

FILES = (
    Column("width"),
    Column("batch × tokens"),
    Column("dense", "ms", ".3f"),
    Column("truncated / dense", spec=".3f"),
    Column("stacked / truncated", spec=".3f"),
    Column("nodes: dense, truncated, stacked"),
    Column("products"),
)
STEPS = (
    Column("width"),
    Column("tokens"),
    Column("LOW step", "ms", ".1f"),
    Column("stacked / separate", spec=".3f"),
    Column("from", spec=".2f"),
    Column("to", spec=".2f"),
)


class Factors(nn.Module):
    """A site in LOW: x ↦ left (right x) + bias."""

    def __init__(self, n: int, m: int, rank: int) -> None:
        super().__init__()
        self.right, self.left = nn.Linear(n, rank, bias=False), nn.Linear(rank, m)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.left(self.right(x))
        return y


class Decoder(nn.Module):
    """A block as of Llama: query, key and value read one input, and so do the two first layers of the gated MLP.

    layer: makes a site from inputs and outputs. stacked: whether the right factors of one input run as one product.
    """

    def __init__(
        self, width: int, layer: Callable[[int, int], nn.Module] = nn.Linear, *, stacked: bool = False
    ) -> None:
        super().__init__()
        inside = width * 8 // 3 // 64 * 64
        self.stacked, self.heads = stacked, max(1, width // 64)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (layer(width, width) for _ in range(4))
        self.gate, self.up, self.down = layer(width, inside), layer(width, inside), layer(inside, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for y in self._of(self.norm1(x), self.query, self.key, self.value)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.out(attended)
        gate, up = self._of(self.norm2(x), self.gate, self.up)
        y: Tensor = x + self.down(F.silu(gate) * up)
        return y

    def _of(self, x: Tensor, *sites: nn.Module) -> list[Tensor]:
        if not self.stacked:
            return [site(x) for site in sites]
        rights = [site.right.weight for site in sites]  # type: ignore[union-attr] # of Factors
        parts = F.linear(x, torch.cat(rights)).split([len(right) for right in rights], -1)  # type: ignore[arg-type]
        return [site.left(part) for site, part in zip(sites, parts, strict=True)]  # type: ignore[operator]


def stacked(quick: bool) -> Table:
    """Files of two blocks at rank 1/4: dense, truncated, and truncated with stacks."""
    rows: list[tuple[Cell, ...]] = []
    for width in (64,) if quick else (256, 512, 768):
        with tempfile.TemporaryDirectory() as folder:
            paths = _files(width, Path(folder))
            graphs = [onnx.load(path).graph.node for path in paths]
            nodes = ", ".join(str(len(graph)) for graph in graphs)
            products = ", ".join(str(sum(node.op_type in ("MatMul", "Gemm") for node in graph)) for graph in graphs)
            opened = [session(path, (PROVIDER,)) for path in paths]
            for batch, tokens in ((1, 1),) if quick else ((1, 1), (1, 128), (32, 1), (32, 128)):
                x = np.random.default_rng(0).standard_normal((batch, tokens, width)).astype(np.float32)
                dense, low, stack = (bound(each, {each.get_inputs()[0].name: x}) for each in opened)
                large = batch * tokens > 1000
                settings = {"repeats": 5 if quick else 15 if large else 60, "inner": 1 if quick or large else 3}
                less, more = interleaved(dense, low, **settings), interleaved(low, stack, **settings)
                times = 1e3 * less.first, less.ratio, more.ratio
                rows.append((width, f"{batch} × {tokens}", *times, nodes, products))
                print(*rows[-1], sep="  ", file=sys.stderr, flush=True)  # a table that is cut short is lost
    return Table(FILES, tuple(rows), f"{PROVIDER}; two blocks of attention and a gated MLP.")


def _files(width: int, folder: Path) -> list[Path]:
    """Dense, truncated, and truncated with stacks."""
    seed_all(0)
    x = torch.randn(2, 16, width)
    net = dr.transform(nn.Sequential(Decoder(width), Decoder(width)).eval(), (x,), rank=dr.Ratio(0.25), leave=())
    paths = [folder / f"{name}.onnx" for name in ("dense", "truncated", "stacked")]
    for path in paths:
        if path is paths[1]:
            dr.enter_(net, dr.Phase.LOW, split=random_factors)
        stack = path is paths[2]
        dr.export_onnx(dr.inline(net), (x,), path, batch_sizes=(1,), providers=("CPUExecutionProvider",), stacked=stack)
    return paths


def stacked_steps(quick: bool) -> Table:
    """A compiled step of two blocks in LOW at rank 1/4 with AdamW: one product with the concatenated right factors."""
    rows: list[tuple[Cell, ...]] = []
    sizes = ((64, 32),) if quick else ((256, 1024), (512, 1024), (768, 32768), (1024, 32768), (2048, 32768))
    for width, tokens in sizes:
        if tokens > 1024 and DEVICE != "cuda":
            continue
        torch._dynamo.reset()
        x = torch.randn(max(1, tokens // 256), min(tokens, 256), width, device=DEVICE)
        steps = [_step(width, x, stack) for stack in (False, True)]
        pair = interleaved(*steps, repeats=3 if quick else 25)
        assert pair.spread is not None
        rows.append((width, tokens, 1e3 * pair.first, pair.ratio, *pair.spread))
        print(*rows[-1], sep="  ", file=sys.stderr, flush=True)
    note = (
        "A prototype, which is no part of the package; in bfloat16 on a GPU, else in float32. *from*, *to*: all pairs"
    )
    return Table(STEPS, tuple(rows), f"{note} but the outer tenths.")


def _step(width: int, x: Tensor, stack: bool) -> Callable[[], None]:
    seed_all(0)

    def layer(n: int, m: int) -> nn.Module:
        return Factors(n, m, width // 4)

    model = nn.Sequential(*(Decoder(width, layer, stacked=stack) for _ in range(2))).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    forward = torch.compile(model, fullgraph=True, dynamic=False)

    def step() -> None:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
            loss = forward(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step
