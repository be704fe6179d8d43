"""Twenty switches under DistributedDataParallel: equal in all processes, and as in one process on the whole batch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from several import in_processes
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import dynrank_fx as dr
from dynrank_fx.processes import digest_of
from dynrank_fx.rewrite import switched_modules

ROWS, WIDTH, SWITCHES, STEPS = 16, 16, 20, 2


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(WIDTH, 32), nn.Linear(32, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


class Parts(nn.Module):
    """Parts that are captured each for itself, since the whole asks for a value."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Mlp(), nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.second(y) if float(y.detach().abs().sum()) >= 0 else y


class Tied(nn.Module):
    """Three layers of which two share a weight, and two read one input."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.back, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)
        self.back.weight = self.v.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.q(x) * torch.tanh(self.k(x)) + self.back(torch.tanh(self.v(x)))))


class Unused(Mlp):
    """With a layer that the loss does not use in every second batch."""

    def __init__(self) -> None:
        super().__init__()
        self.more = nn.Linear(32, 4)

    def forward(self, x: Tensor, whole: bool = True) -> Tensor:
        y = torch.tanh(self.b(torch.tanh(self.a(x))))
        return self.c(y) + self.more(y) if whole else self.c(y)


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1)
        self.c = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.b(torch.tanh(self.a(x.view(-1, 1, 4, 4)))))
        return self.c(y.mean((2, 3)))


def _sgd(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)


def _adamw(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(net.parameters(), lr=1e-3, eps=1e-4)


@dataclass(frozen=True)
class Case:
    """A way to train under DDP. choices: of the wrapper. transforming: how the net is made."""

    name: str
    model: Callable[[], nn.Module] = Mlp
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = _sgd
    choices: dict[str, Any] = field(default_factory=dict)
    transforming: dict[str, Any] = field(default_factory=dict)
    accumulate: int = 1
    compile: str = ""  # "inside" the wrapper, or "outside"
    backend: str = "aot_eager"
    hook: bool = False
    inner: bool = False  # whether enter_ is given the net, and not the wrapper


CASES = (
    Case("sgd"),
    Case("accumulated", optimizer=_adamw, accumulate=2),
    Case("a static graph", choices={"static_graph": True}, hook=True),
    Case("unused", Unused, choices={"find_unused_parameters": True}, transforming={"form": dr.Form.LAYERS}),
    Case("parts", Parts, _adamw),
    Case("shared and tied", Tied, transforming={"share_inputs": True}),
)
COMPILED = Case("compiled", optimizer=_adamw, compile="outside")
MORE = (
    Case("adamw, the net itself", optimizer=_adamw, inner=True),
    Case("bucket views", choices={"gradient_as_bucket_view": True, "bucket_cap_mb": 0.001}, accumulate=2),
    Case("layers", Mlp, _adamw, transforming={"form": dr.Form.LAYERS}),
    Case("convolutions", Convolutions, _adamw),
)
COMPILED_OTHERWISE = (
    Case("compiled inside", compile="inside"),
    Case("compiled by inductor", optimizer=_adamw, compile="outside", backend="inductor"),
    Case("compiled inside by inductor, accumulated", compile="inside", backend="inductor", accumulate=2),
    Case("compiled parts", Parts, _adamw, compile="outside"),
)


def _made(case: Case) -> nn.Module:
    torch.manual_seed(0)
    model = case.model()
    return dr.transform(model, (torch.randn(2, WIDTH),), allow_unprofitable=True, rank=dr.Fixed(3), **case.transforming)


def _batches() -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    steps = (SWITCHES + 1) * STEPS
    return [(torch.randn(ROWS, WIDTH, generator=draw), torch.randn(ROWS, 4, generator=draw)) for _ in range(steps)]


def _train(
    case: Case, net: nn.Module, called: nn.Module, given: nn.Module, rank: int, count: int
) -> torch.optim.Optimizer:
    """The phases in turn. called: what the loop calls. given: what enter_ is given."""
    optimizer = case.optimizer(net)
    batches = iter(_batches())
    for turn in range(SWITCHES + 1):
        phase = dr.Phase.LOW if turn % 2 else dr.Phase.FULL
        transition = dr.enter_(given, phase, optimizer)
        assert bool(transition) == (turn > 0)
        for _ in range(STEPS):
            x, y = next(batches)
            parts = zip(x.chunk(case.accumulate), y.chunk(case.accumulate), strict=True)
            for index, (inputs, wanted) in enumerate(parts):
                waits = index + 1 < case.accumulate and isinstance(given, DistributedDataParallel)
                with given.no_sync() if waits else contextlib.nullcontext():
                    mine = slice(rank, None, count)
                    more = (turn % 4 < 2,) if case.model is Unused else ()
                    loss = (called(inputs[mine], *more) - wanted[mine]).square().mean() / case.accumulate
                    loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return optimizer


def _weights(net: nn.Module) -> dict[str, Tensor]:
    """What is the same whatever signs the factors have: the weights of the sites, and the other parameters."""
    sites = {name: modules[0].weight.detach().clone() for name, modules in switched_modules(net).items()}
    inside = {id(p) for modules in switched_modules(net).values() for p in modules[0].parameters()}
    return sites | {name: p.detach().clone() for name, p in net.named_parameters() if id(p) not in inside}


def _held(net: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, object]:
    states = {f"{name} {key}": value for name, p in net.named_parameters() for key, value in optimizer.state[p].items()}
    return digest_of(dict(net.named_parameters()) | states)


def _in_each(rank: int, cases: tuple[Case, ...]) -> list[Any]:
    found = []
    for case in cases:
        net = _made(case)
        compiled = torch.compile(net, backend=case.backend, dynamic=False) if case.compile == "inside" else net
        wrapper = DistributedDataParallel(compiled, **case.choices)
        if case.hook:
            wrapper.register_comm_hook(None, allreduce_hook)
        called = torch.compile(wrapper, backend=case.backend, dynamic=False) if case.compile == "outside" else wrapper
        count = torch.distributed.get_world_size()
        optimizer = _train(case, net, called, net if case.inner else wrapper, rank, count)
        found.append((_held(net, optimizer), _weights(net)))
    return found


def _compared(cases: tuple[Case, ...], count: int = 2) -> None:
    each = in_processes(_in_each, cases, count=count, seconds=600)
    for index, case in enumerate(cases):
        held, weights = each[0][index]
        for rank in range(1, count):
            assert each[rank][index][0] == held, f"{case.name}: process {rank} holds something else"
        net = _made(case)
        _train(case, net, net, net, 0, 1)
        for name, weight in _weights(net).items():
            error = (weights[name] - weight).norm() / weight.norm()
            assert error < 1e-5, f"{case.name}: {name} is off by {error:.1e}"


def test_twenty_switches_are_equal_in_both_processes_and_as_in_one() -> None:
    _compared((*CASES, COMPILED))


@pytest.mark.fuzz
def test_twenty_switches_in_other_ways() -> None:
    _compared(MORE)


@pytest.mark.fuzz
def test_twenty_switches_compiled_in_other_ways() -> None:
    _compared(COMPILED_OTHERWISE)


@pytest.mark.fuzz
def test_twenty_switches_in_four_processes() -> None:
    _compared((*CASES, *MORE, COMPILED), count=4)
