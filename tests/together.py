"""What the tests of training by DDP and by FSDP2 share: models, optimizers, data, and what came of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import dynrank_fx as dr
from dynrank_fx.processes import digest_of, whole
from dynrank_fx.rewrite import switched_modules

ROWS, WIDTH, OUTPUTS = 16, 16, 5


class Tied(nn.Module):
    """Four layers of which two share a weight, and three read one input."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.back, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, OUTPUTS)
        self.back.weight = self.v.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.q(x) * torch.tanh(self.k(x)) + self.back(torch.tanh(self.v(x)))))


class Convolutions(nn.Module):
    """Of channels that two processes do not divide."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 13, 3, padding=1), nn.Conv2d(13, 11, 3, padding=1)
        self.c = nn.Linear(11, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.b(torch.tanh(self.a(x.view(-1, 1, 4, 4)))))
        return self.c(y.mean((2, 3)))


def sgd(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)


def adamw(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(net.parameters(), lr=1e-3, eps=1e-4)


def made(model: type[nn.Module], transforming: Mapping[str, Any], device: str = "cpu") -> nn.Module:
    """The same net in every process."""
    torch.manual_seed(0)
    net = dr.transform(
        model(), (torch.randn(2, WIDTH),), allow_unprofitable=True, rank=dr.Fixed(3), **dict(transforming)
    )
    return net.to(device)


def batches(count: int, device: str = "cpu") -> list[tuple[Tensor, Tensor]]:
    """Of all processes together."""
    draw = torch.Generator().manual_seed(1)
    drawn = [
        (torch.randn(ROWS, WIDTH, generator=draw), torch.randn(ROWS, OUTPUTS, generator=draw)) for _ in range(count)
    ]
    return [(x.to(device), y.to(device)) for x, y in drawn]


def device_of(rank: int) -> str:
    """Where a process of this rank trains: its own GPU where the group is of NCCL."""
    return f"cuda:{rank}" if torch.distributed.get_backend() == "nccl" else "cpu"


def weights(net: nn.Module) -> dict[str, Tensor]:
    """What is the same whatever signs the factors have: the weights of the sites, and the other parameters."""
    sites = {}
    for name, modules in switched_modules(net).items():
        full = modules[0].phase == int(dr.Phase.FULL)
        parameters = [whole(p) for p in ([modules[0]._parameters["weight"]] if full else modules[0].factors)]
        sites[name] = parameters[0].detach().clone() if full else modules[0].joined(parameters)
    inside = {id(p) for modules in switched_modules(net).values() for p in modules[0].parameters()}
    others = {n: whole(p).detach().clone() for n, p in net.named_parameters() if id(p) not in inside}
    return {name: weight.detach().cpu() for name, weight in (sites | others).items()}


def held(net: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, object]:
    """A checksum of all that the processes hold together, gathered."""
    states = {f"{name} {key}": value for name, p in net.named_parameters() for key, value in optimizer.state[p].items()}
    return digest_of({name: whole(value.detach()) for name, value in (dict(net.named_parameters()) | states).items()})


def check(name: str, each: list[tuple[dict[str, object], dict[str, Tensor]]], alone: nn.Module, near: float) -> None:
    """That all processes hold the same, which is what one comes to. near: the relative error that is allowed."""
    checksum, together = each[0]
    for rank, (other, _) in enumerate(each):
        assert other == checksum, f"{name}: process {rank} holds something else"
    for weight, value in weights(alone).items():
        error = (together[weight] - value).norm() / value.norm()
        assert error < near, f"{name}: {weight} is off by {error:.1e}"
