"""Twenty switches under DistributedDataParallel: equal in all processes, and as in one process on the whole batch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from several import in_processes
from together import OUTPUTS, WIDTH, Convolutions, Tied, adamw, batches, check, device_of, held, made, sgd, weights
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import dynrank_fx as dr

FEW, MANY, STEPS = 4, 20, 2


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(WIDTH, 32), nn.Linear(32, 32), nn.Linear(32, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


class Parts(nn.Module):
    """Parts that are captured each for itself, since the whole asks for a value."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Mlp(), nn.Sequential(nn.Linear(OUTPUTS, 16), nn.Tanh(), nn.Linear(16, OUTPUTS))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.second(y) if float(y.detach().abs().sum()) >= 0 else y


class Unused(Mlp):
    """With a layer that the loss does not use in every second batch."""

    def __init__(self) -> None:
        super().__init__()
        self.more = nn.Linear(32, OUTPUTS)

    def forward(self, x: Tensor, whole: bool = True) -> Tensor:
        y = torch.tanh(self.b(torch.tanh(self.a(x))))
        return self.c(y) + self.more(y) if whole else self.c(y)


@dataclass(frozen=True)
class Case:
    """A way to train under DDP. choices: of the wrapper. transforming: how the net is made."""

    name: str
    model: type[nn.Module] = Mlp
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = sgd
    choices: dict[str, Any] = field(default_factory=dict)
    transforming: dict[str, Any] = field(default_factory=dict)
    accumulate: int = 1
    compile: str = ""  # "inside" the wrapper, or "outside"
    backend: str = "aot_eager"
    hook: bool = False
    switches: int = FEW
    inner: bool = False  # whether enter_ is given the net, and not the wrapper


CASES = (
    Case("sgd", switches=MANY),
    Case("accumulated", optimizer=adamw, accumulate=2),
    Case("a static graph", choices={"static_graph": True}, hook=True),
    Case("unused", Unused, choices={"find_unused_parameters": True}, transforming={"form": dr.Form.LAYERS}),
    Case("parts", Parts, adamw),
    Case("shared and tied", Tied, transforming={"share_inputs": True}),
)
COMPILED = Case("compiled", optimizer=adamw, compile="outside")
MORE = (
    Case("adamw, the net itself", optimizer=adamw, inner=True),
    Case("bucket views", choices={"gradient_as_bucket_view": True, "bucket_cap_mb": 0.001}, accumulate=2),
    Case("layers", Mlp, adamw, transforming={"form": dr.Form.LAYERS}),
    Case("convolutions", Convolutions, adamw),
)
COMPILED_OTHERWISE = (
    Case("compiled inside", compile="inside"),
    Case("compiled by inductor", optimizer=adamw, compile="outside", backend="inductor"),
    Case("compiled inside by inductor, accumulated", compile="inside", backend="inductor", accumulate=2),
    Case("compiled parts", Parts, adamw, compile="outside"),
)


def _train(
    case: Case, net: nn.Module, called: nn.Module, given: nn.Module, rank: int, count: int
) -> torch.optim.Optimizer:
    """The phases in turn. called: what the loop calls. given: what enter_ is given."""
    optimizer = case.optimizer(net)
    device = next(net.parameters()).device
    coming = iter(batches((case.switches + 1) * STEPS, str(device)))
    for turn in range(case.switches + 1):
        phase = dr.Phase.LOW if turn % 2 else dr.Phase.FULL
        transition = dr.enter_(given, phase, optimizer)
        assert bool(transition) == (turn > 0)
        for _ in range(STEPS):
            x, y = next(coming)
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


def _in_each(rank: int, cases: tuple[Case, ...]) -> list[Any]:
    found = []
    for case in cases:
        net = made(case.model, case.transforming, device_of(rank))
        compiled = torch.compile(net, backend=case.backend, dynamic=False) if case.compile == "inside" else net
        wrapper = DistributedDataParallel(compiled, **case.choices)
        if case.hook:
            wrapper.register_comm_hook(None, allreduce_hook)
        called = torch.compile(wrapper, backend=case.backend, dynamic=False) if case.compile == "outside" else wrapper
        count = torch.distributed.get_world_size()
        optimizer = _train(case, net, called, net if case.inner else wrapper, rank, count)
        found.append((held(net, optimizer), weights(net)))
    return found


def _compared(cases: tuple[Case, ...], count: int = 2, backend: str = "gloo", near: float = 1e-5) -> None:
    each = in_processes(_in_each, cases, count=count, seconds=600, backend=backend)
    for index, case in enumerate(cases):
        net = made(case.model, case.transforming)
        _train(case, net, net, net, 0, 1)
        check(case.name, [done[index] for done in each], net, near)


def _many(*cases: Case) -> tuple[Case, ...]:
    return tuple(replace(case, switches=MANY) for case in cases)


def test_twenty_switches_are_equal_in_both_processes_and_as_in_one() -> None:
    _compared((*CASES, COMPILED))


@pytest.mark.fuzz
def test_twenty_switches_in_other_ways() -> None:
    _compared(_many(*CASES, COMPILED, *MORE))


@pytest.mark.fuzz
def test_twenty_switches_compiled_in_other_ways() -> None:
    _compared(_many(*COMPILED_OTHERWISE))


@pytest.mark.fuzz
def test_twenty_switches_in_four_processes() -> None:
    _compared(_many(*CASES, *MORE, COMPILED), count=4)


@pytest.mark.gpu
def test_gpus_are_equal_and_as_one_cpu(gpus: int) -> None:
    _compared(_many(*CASES, *MORE, COMPILED), count=gpus, backend="nccl", near=1e-3)
