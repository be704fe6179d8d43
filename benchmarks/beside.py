"""A training step beside what a user would pick instead: time, tokens per second, memory, parameters that are kept.

All are two transformer layers of one width on the same input, compiled, with fused AdamW; ranks are a quarter of the
width. The other ways are written here from their papers, as small as they go:

- CoLA (arXiv 2502.10940): two factors with SiLU between them.
- SLTrain (arXiv 2406.02214): two factors and a sparse matrix of 3 % of the entries, added up to a dense weight.
- LoRA (arXiv 2106.09685): a frozen weight and two factors beside it.
- GaLore (arXiv 2403.03507): a dense weight, whose optimizer works in a subspace of the gradient, found now and then.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.utils.flop_counter import FlopCounterMode

import dynrank_fx as dr
from benchmarks.measuring import DEVICE, chars
from benchmarks.result import Cell, Column, Table
from benchmarks.study.phases import most_allocated
from dynrank_fx.randomness import seed_all
from dynrank_fx.timing import interleaved

COLUMNS = (
    Column("width"),
    Column("way"),
    Column("parameters", spec=".2f"),
    Column("FLOPs of a step", spec=".2f"),
    Column("its time", spec=".2f"),
    Column("tokens", "/s", ",.0f"),
    Column("bytes between steps", spec=".2f"),
    Column("bytes at the peak", spec=".2f"),
    Column("FLOPs of the result", spec=".2f"),
)
EVERY = 200
"""Steps from one subspace of GaLore to the next, as in its paper."""
DENSITY = 0.03


class Cola(nn.Module):
    """x ↦ B silu(A x) + b."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.right = nn.Linear(linear.in_features, rank, bias=False)
        self.left = nn.Linear(rank, linear.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.left(F.silu(self.right(x)))


class SlTrain(nn.Module):
    """x ↦ (B A + S) x + b, S sparse at places that are drawn once."""

    places: Tensor

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        m, n = linear.weight.shape
        self.left = nn.Parameter(torch.randn(m, rank) / math.sqrt(n))
        self.right = nn.Parameter(torch.randn(rank, n) / math.sqrt(rank))
        self.values = nn.Parameter(torch.zeros(round(DENSITY * m * n)))
        self.register_buffer("places", torch.randperm(m * n)[: self.values.numel()])
        self.bias = nn.Parameter(torch.zeros(m))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.left @ self.right
        weight = weight.flatten().index_add(0, self.places, self.values).view_as(weight)
        return F.linear(x, weight, self.bias)


class Lora(nn.Module):
    """x ↦ W x + b + B A x, W and b frozen."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.right = nn.Linear(linear.in_features, rank, bias=False)
        self.left = nn.Linear(rank, linear.out_features, bias=False)
        nn.init.zeros_(self.left.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.left(self.right(x))


class GaLore(Optimizer):
    """Adam on Pᵀ G, where P [m, r] are the leading left singular vectors of a gradient G [m, n] of every EVERY steps;
    AdamW on what is no matrix.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, rank: int) -> None:
        everything = list(parameters)
        matrices = [p for p in everything if p.ndim == 2]
        known = {id(p) for p in matrices}
        super().__init__(matrices, {"lr": lr, "rank": rank})
        self.others = AdamW([p for p in everything if id(p) not in known], lr=lr, fused=True)

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        self.others.step()
        for group in self.param_groups:
            for p in group["params"]:
                state, gradient = self.state[p], p.grad
                if not state:
                    state.update(step=0, m=torch.zeros(group["rank"], p.shape[1], device=p.device))
                    state["v"] = torch.zeros_like(state["m"])
                if state["step"] % EVERY == 0:
                    state["basis"] = torch.linalg.svd(gradient, full_matrices=False)[0][:, : group["rank"]].contiguous()
                state["step"] += 1
                small = state["basis"].T @ gradient
                state["m"].lerp_(small, 0.1)
                state["v"].lerp_(small.square(), 0.001)
                scale = math.sqrt(1 - 0.999 ** state["step"]) / (1 - 0.9 ** state["step"])
                p.sub_(state["basis"] @ (state["m"] / state["v"].sqrt().add_(1e-8)), alpha=group["lr"] * scale)

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self.others.zero_grad(set_to_none)


@dataclass
class Way:
    """model: in training. result: what has the form of what is deployed, factors added up where the way does that."""

    name: str
    model: nn.Module
    optimizer: Optimizer
    result: nn.Module


def beside(quick: bool) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for width in (64,) if quick else (512, 1024):
        rows += measured(width, tokens=32 if quick else 1024, repeats=3 if quick else 15)
    note = f"Over the dense model's. GaLore finds its subspace every {EVERY} steps: that step is not among those timed."
    return Table(COLUMNS, tuple(rows), note)


def measured(width: int, tokens: int, repeats: int) -> Iterator[tuple[Cell, ...]]:
    torch._dynamo.reset()
    seed_all(0)
    found = {way.name: way for way in ways(width)}
    inputs = {name: torch.randn(4, tokens // 4, _width(way.model), device=DEVICE) for name, way in found.items()}
    steps = {name: _step(way, inputs[name]) for name, way in found.items()}
    flops = {name: _flops(way.model, inputs[name]) for name, way in found.items()}
    held, peak = {}, {}
    for name, way in found.items():
        steps[name]()
        held[name] = _held(way)
        peak[name] = held[name] + most_allocated(steps[name], DEVICE)
    kept = {name: sum(p.numel() for p in way.model.parameters()) for name, way in found.items()}
    ends = {name: _forward_flops(way.result, inputs[name]) for name, way in found.items()}
    for name in found:
        pair = interleaved(steps["dense"], steps[name], repeats=repeats)
        ratios = (each[name] / each["dense"] for each in (held, peak, ends))
        speed = tokens / (pair.first * pair.ratio)
        parts = kept[name] / kept["dense"], flops[name] / flops["dense"], pair.ratio, speed
        row: tuple[Cell, ...] = (width, name, *parts, *ratios)
        print(*row, sep="  ", file=sys.stderr, flush=True)  # a table that is cut short is lost
        yield row


def ways(width: int) -> Iterator[Way]:
    rank, dense = width // 4, _layers(width)
    net = dr.transform(dense, (torch.randn(2, 8, width),), rank=dr.Ratio(0.25))
    dr.enter_(net, dr.Phase.LOW)
    plan = dr.plan_of(net)
    heads = max(1, width // 64)
    narrow = round((plan.narrower or 1) * width / heads) * heads
    yield _way("dense", dense)
    yield _way("narrower dense", _layers(narrow, heads))
    yield _way("dynrank-fx, LOW", net, dr.truncate(net))
    yield _way("CoLA", _with(dense, lambda linear: Cola(linear, rank)))
    yield _way("SLTrain", _with(dense, lambda linear: SlTrain(linear, rank)), dense)
    yield _way("LoRA, merged", _with(dense, lambda linear: Lora(linear, rank)), dense)
    model = copy.deepcopy(dense).to(DEVICE)
    yield Way("GaLore", model, GaLore(model.parameters(), 1e-4, rank), model)


def _way(name: str, model: nn.Module, result: nn.Module | None = None) -> Way:
    model = copy.deepcopy(model).to(DEVICE)
    trained = [p for p in model.parameters() if p.requires_grad]
    return Way(name, model, AdamW(trained, lr=1e-4, fused=True), model if result is None else result.to(DEVICE))


def _layers(width: int, heads: int | None = None) -> nn.Module:
    return nn.Sequential(*(chars.Layer(width, heads or max(1, width // 64)) for _ in range(2)))


def _width(model: nn.Module) -> int:
    return int(next(p for name, p in model.named_parameters() if "norm1" in name).shape[0])


def _with(model: nn.Module, layer: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """The model with another layer in place of every linear."""
    model = copy.deepcopy(model)
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear):
            model.set_submodule(name, layer(linear))
    return model


def _step(way: Way, x: Tensor) -> Callable[[], None]:
    forward = torch.compile(way.model, fullgraph=True, dynamic=False)

    def step() -> None:
        forward(x).square().mean().backward()
        way.optimizer.step()
        way.optimizer.zero_grad(set_to_none=True)

    return step


def _held(way: Way) -> int:
    """Bytes of parameters and of the optimizer's state."""
    optimizers = [way.optimizer, getattr(way.optimizer, "others", None)]
    states = [state for each in optimizers if each is not None for state in each.state.values()]
    tensors = [t for state in states for t in state.values() if isinstance(t, Tensor)]
    return sum(t.nbytes for t in (*way.model.parameters(), *way.model.buffers(), *tensors))


def _flops(model: nn.Module, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        model(x).square().mean().backward()
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops()


@torch.no_grad()
def _forward_flops(model: nn.Module, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops()
