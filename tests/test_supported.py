"""The table of docs/supported.md, line by line: what it says of the plan is what the plan says."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint

import dynrank_fx as dr

PAGE = (Path(__file__).parents[1] / "docs" / "supported.md").read_text(encoding="utf-8")
TABLE = PAGE.partition("\n## ")[0]
ROWS = dict(re.findall(r"^\| (?!what|---)(.+?) \| (.+?) \|", TABLE, re.MULTILINE))


class Apply(nn.Module):
    """Modules and parameters under the names given, and a forward over them."""

    def __init__(self, forward: Callable[..., Any], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.run = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args: Tensor) -> Any:
        return self.run(self, *args)


class Conv1D(nn.Module):
    """As in transformers: x @ weight + bias."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = matrix(8, 8), nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


def matrix(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def hooked() -> nn.Module:
    layer = nn.Linear(8, 8)
    layer.register_forward_hook(lambda module, args, output: output + 1)
    return nn.Sequential(layer, nn.Linear(8, 8))


def branching(self: Any, x: Tensor) -> Tensor:
    return self.a(x) if float(x.sum()) > 0 else self.b(self.a(x))


def no_grad(self: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        x = self.a(x)
    return self.b(x)


def linear() -> nn.Linear:
    return nn.Linear(8, 8)


def convs(d: int, transposed: bool = False) -> nn.Module:
    kind = getattr(nn, f"Conv{'Transpose' if transposed else ''}{d}d")
    return nn.Sequential(kind(8, 8, 3, stride=2, padding=1), kind(8, 8, 3, dilation=2, padding=2, groups=2))


X, TOKENS = torch.randn(4, 8), torch.randint(16, (4, 6))
IMAGES = {d: torch.randn(2, 8, *[8] * d) for d in (1, 2, 3)}
SEQUENCE = torch.randn(4, 6, 8)
embedding = nn.Embedding(16, 8)
tied = Apply(lambda s, i: s.head(s.embed(i)), embed=nn.Embedding(16, 8), head=nn.Linear(8, 16, bias=False))
tied.head.weight = tied.embed.weight
shared = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
shared[2].weight = shared[0].weight
again = linear()

# For the first cell of a line: models, each with its inputs.
CASES: dict[str, list[tuple[nn.Module, tuple[Any, ...]]]] = {
    "`nn.Linear`, `F.linear` on a parameter": [
        (linear(), (X,)),
        (Apply(lambda s, x: F.linear(x, s.w), w=matrix(8, 8)), (X,)),
    ],
    "`nn.Conv1d/2d/3d`, `F.conv1d/2d/3d`": [
        *((convs(d), (IMAGES[d],)) for d in (1, 2, 3)),
        (nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"), (IMAGES[2],)),
        (Apply(lambda s, x: F.conv2d(x, s.w), w=matrix(8, 8, 3, 3)), (IMAGES[2],)),
    ],
    "`nn.ConvTranspose1d/2d/3d`": [(convs(d, transposed=True), (IMAGES[d],)) for d in (1, 2, 3)],
    "`@`, `matmul`, `mm`, `bmm`, `addmm`, `baddbmm`, `einsum` with a parameter": [
        (Apply(lambda s, x: torch.mm(x @ s.a, s.b), a=matrix(8, 8), b=matrix(8, 8)), (X,)),
        (Apply(lambda s, x: torch.addmm(s.b, x, s.a), a=matrix(8, 8), b=nn.Parameter(torch.randn(8))), (X,)),
        (Apply(lambda s, x: torch.bmm(x, s.a), a=matrix(4, 8, 8)), (SEQUENCE,)),
        (Apply(lambda s, x: torch.baddbmm(x, x, s.a), a=matrix(4, 8, 8)), (SEQUENCE,)),
        (Apply(lambda s, x: torch.einsum("bti,hio->bhto", x, s.a), a=matrix(2, 8, 8)), (SEQUENCE,)),
    ],
    "`nn.Embedding`, tied to a head or not": [(embedding, (TOKENS,)), (tied, (TOKENS,))],
    "`nn.MultiheadAttention`, `nn.TransformerEncoderLayer`, `nn.TransformerDecoderLayer`": [
        (Apply(lambda s, x: s.a(x, x, x)[0], a=nn.MultiheadAttention(8, 2, batch_first=True)), (SEQUENCE,)),
        (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (SEQUENCE,)),
        (nn.TransformerDecoderLayer(8, 2, 16, batch_first=True), (SEQUENCE, SEQUENCE)),
    ],
    "`Conv1D` of transformers": [(Conv1D(), (X,))],
    "experts whose matrices are stacked in one weight": [
        (Apply(lambda s, x: torch.einsum("bti,eio->ebto", x, s.up).sum(0), up=matrix(3, 8, 8)), (SEQUENCE,))
    ],
    "weights that the model's own code multiplies by, also transposed or in parts": [
        (Apply(lambda s, x: F.linear(x, s.fc.weight) + s.fc.bias, fc=linear()), (X,)),
        (Apply(lambda s, x: x @ s.w.t(), w=matrix(8, 8)), (X,)),
        (Apply(lambda s, x: sum(x @ part for part in s.w.chunk(2, 1)), w=matrix(8, 16)), (X,)),
    ],
    "a layer that is called several times, several layers with one weight": [
        (Apply(lambda s, x: s.fc(s.fc(x)), fc=again), (X,)),
        (shared, (X,)),
    ],
    "frozen weights; bfloat16, float16, float64": [
        (linear().requires_grad_(False), (X,)),
        *((linear().to(dtype), (X.to(dtype),)) for dtype in (torch.bfloat16, torch.float16, torch.float64)),
    ],
    "depthwise convolutions": [(nn.Conv2d(8, 8, 3, groups=8), (IMAGES[2],))],
    "`nn.LSTM`, `nn.GRU`, `nn.RNN`": [
        (Apply(lambda s, x: s.a(x)[0], a=kind(8, 8, batch_first=True)), (SEQUENCE,))
        for kind in (nn.LSTM, nn.GRU, nn.RNN)
    ],
    "weight norm, spectral norm and others of `torch.nn.utils.parametrizations`": [
        (weight_norm(linear()), (X,)),
        (spectral_norm(linear()), (X,)),
    ],
    "weights that are computed (standardised, masked, ...)": [
        (Apply(lambda s, x: F.linear(x, s.fc.weight / s.fc.weight.norm()), fc=linear()), (X,))
    ],
    "`nn.Bilinear`": [(nn.Bilinear(8, 8, 8), (X, X))],
    "`nn.EmbeddingBag`": [(nn.EmbeddingBag(16, 8), (TOKENS,))],
    "layers with hooks": [(hooked(), (X,))],
    "models that torch.fx can trace": [(nn.Sequential(linear(), nn.ReLU()), (X,))],
    "torch's own attention layers, code that branches on the shapes of its inputs": [
        (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (SEQUENCE,)),
        (Apply(lambda s, x: s.a(x) if x.shape[1] == 8 else x, a=linear()), (X,)),
    ],
    "code that branches on values, autograd functions with a backward of their own, activation checkpoints, "
    "`torch.no_grad` in forward": [
        (Apply(branching, a=linear(), b=linear()), (X,)),
        (Apply(lambda s, x: checkpoint(s.b, s.a(x), use_reentrant=False), a=linear(), b=linear()), (X,)),
        (Apply(no_grad, a=linear(), b=linear()), (X,)),
    ],
}


def test_every_line_is_tested():
    assert list(ROWS) == list(CASES)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", CASES)
def test_the_plan_says_what_the_line_says(what):
    for model, inputs in CASES[what]:
        net = dr.transform(model, inputs, rank=dr.Fixed(2), allow_unprofitable=True, allow_empty=True)
        plan = dr.plan_of(net)
        said = ROWS[what].strip("*")
        if said == "site":
            assert not plan.skipped, plan.skipped
            assert plan.sites
        elif said.startswith("dense: "):
            reasons = [skipped.reason for skipped in plan.skipped]
            assert any(said.removeprefix("dense: ") in reason for reason in reasons), reasons
        else:
            assert plan.capture.startswith(said), plan.capture
            assert plan.sites
        assert torch.equal(net.eval()(*inputs), model.eval()(*inputs))
