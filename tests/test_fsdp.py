"""Twenty switches under fully_shard (FSDP2): all processes hold what one process on the whole batch comes to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from several import in_processes
from together import OUTPUTS, WIDTH, Convolutions, Tied, adamw, batches, check, device_of, held, made, sgd, weights
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

import dynrank_fx as dr
from dynrank_fx.rewrite import switched_modules

STEPS = 2


class Block(nn.Module):
    """Sizes that two processes do not divide, and a norm that is no site."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 27), nn.Linear(27, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = Block(), Block(), nn.Linear(WIDTH, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.two(self.one(x)))


class Parts(Blocks):
    """Blocks that are captured each for itself, since the whole asks for a value."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        return self.head(self.two(y) if float(y.detach().abs().sum()) >= 0 else y)


def _leaves(net: nn.Module, **choices: Any) -> None:
    for modules in switched_modules(net).values():
        fully_shard(modules[0], **choices)


def _groups(net: nn.Module, **choices: Any) -> None:
    for block in (net.get_submodule("one"), net.get_submodule("two")):
        fully_shard([block.get_submodule("up"), block.get_submodule("down")], **choices)


def _blocks(net: nn.Module, **choices: Any) -> None:
    for name in ("one", "two"):
        fully_shard(net.get_submodule(name), **choices)


def _root(net: nn.Module, **choices: Any) -> None:
    """Nothing below the root."""


@dataclass(frozen=True)
class Case:
    """A way to train under FSDP2. shard: what is sharded below the root. choices: of fully_shard."""

    name: str
    model: type[nn.Module] = Blocks
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = sgd
    shard: Callable[..., None] = _root
    choices: dict[str, Any] = field(default_factory=dict)
    transforming: dict[str, Any] = field(default_factory=dict)
    accumulate: int = 1
    clip: float = 0.0
    compiled: bool = False
    hsdp: bool = False  # two copies of the net, each in two parts
    switches: int = 2
    near: float = 1e-5  # the error allowed


_LAYERS = {"form": dr.Form.LAYERS}
_BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
CASES = (
    Case("root"),
    Case("root, kept after forward", optimizer=adamw, choices={"reshard_after_forward": False}, clip=0.05),
    Case("leaves", shard=_leaves, optimizer=adamw, switches=20),
    Case("groups", shard=_groups, choices={"reshard_after_forward": True}, accumulate=2),
    Case("blocks of layers", shard=_blocks, optimizer=adamw, transforming=_LAYERS),
    Case("parts", Parts, shard=_blocks),
    Case("shared and tied", Tied, adamw, transforming={"share_inputs": True}),
    Case("convolutions", Convolutions, adamw, shard=_leaves),
    Case("offloaded", choices={"offload_policy": CPUOffloadPolicy(pin_memory=False)}),
    Case("bfloat16", choices={"mp_policy": _BF16}, shard=_groups, near=0.05),
    Case("compiled", optimizer=adamw, compiled=True),
)
MORE = tuple(
    replace(case, switches=20, compiled=compiled, choices=case.choices | after)
    for case in CASES[:-1]
    for after in ({}, {"reshard_after_forward": True}, {"reshard_after_forward": False})
    for compiled in (False, True)
)
MESHES = (
    Case("copies of parts", shard=_groups, hsdp=True, switches=20),
    Case("copies of leaves", optimizer=adamw, shard=_leaves, hsdp=True, clip=0.05),
    Case("copies of convolutions", Convolutions, adamw, hsdp=True),
    Case("copies, compiled", optimizer=adamw, hsdp=True, compiled=True),
    Case("four parts", shard=_blocks, transforming=_LAYERS, optimizer=adamw, switches=20),
    Case("four parts, shared and tied", Tied, transforming={"share_inputs": True}),
)


def _train(case: Case, net: nn.Module, rank: int, count: int) -> torch.optim.Optimizer:
    """The phases in turn, and a step in each. count: of processes."""
    optimizer = case.optimizer(net)
    called = torch.compile(net, backend="aot_eager", dynamic=False) if case.compiled else net
    device = "cpu" if count == 1 else device_of(rank)
    coming = iter(batches((case.switches + 1) * STEPS, device))
    for turn in range(case.switches + 1):
        assert bool(dr.enter_(called, dr.Phase.LOW if turn % 2 else dr.Phase.FULL, optimizer)) == (turn > 0)
        for _ in range(STEPS):
            x, y = next(coming)
            for index, (inputs, wanted) in enumerate(
                zip(x.chunk(case.accumulate), y.chunk(case.accumulate), strict=True)
            ):
                if count > 1:
                    net.set_requires_gradient_sync(index + 1 == case.accumulate)
                mine = slice(rank, None, count)
                ((called(inputs[mine]) - wanted[mine]).square().mean() / case.accumulate).backward()
            if case.clip:
                nn.utils.clip_grad_norm_(net.parameters(), case.clip)
            optimizer.step()
            optimizer.zero_grad()
    return optimizer


def _in_each(rank: int, cases: tuple[Case, ...]) -> list[Any]:
    found = []
    for case in cases:
        device = device_of(rank)
        net = made(case.model, case.transforming, device)
        kind, parameters = type(net), len(list(net.parameters()))
        choices = dict(case.choices)
        if case.hsdp:
            choices["mesh"] = init_device_mesh(torch.device(device).type, (2, 2), mesh_dim_names=("copies", "parts"))
        case.shard(net, **choices)
        fully_shard(net, **choices)
        optimizer = _train(case, net, rank, torch.distributed.get_world_size())
        assert isinstance(net, kind)
        assert len(list(net.parameters())) == parameters
        assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in net.parameters()}
        assert all(isinstance(p, torch.distributed.tensor.DTensor) for p in net.parameters())
        found.append((held(net, optimizer), weights(net)))
    return found


def _compared(cases: tuple[Case, ...], count: int = 2, near: float | None = None, **given: Any) -> None:
    each = in_processes(_in_each, cases, count=count, **given)
    for index, case in enumerate(cases):
        net = made(case.model, case.transforming)
        _train(case, net, 0, 1)
        check(case.name, [done[index] for done in each], net, case.near if near is None else max(near, case.near))


def test_switches_under_fully_shard_are_those_of_one_process() -> None:
    _compared(CASES, seconds=240)


# Dynamo asks every input for .grad, also what a part gives the next, and hides torch's warning of that, though not from
# pytest, which makes it an error.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.fuzz
@pytest.mark.parametrize("index", range(len(MORE)))
def test_twenty_switches_in_every_way(index: int) -> None:
    _compared((MORE[index],), seconds=300)


@pytest.mark.fuzz
def test_four_processes_in_parts_and_copies() -> None:
    _compared(MESHES, count=4, seconds=500)


@pytest.mark.gpu
def test_gpus_are_as_one_cpu(gpus: int) -> None:
    _compared((*CASES, *(MESHES if gpus == 4 else ())), count=gpus, backend="nccl", seconds=500, near=1e-3)
