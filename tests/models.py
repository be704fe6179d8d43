"""Small models and the cases of the contract tests: one per kind of op, each with what makes it hard."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class OneLayer(nn.Module):
    """A layer between others, so that its weights get gradients that differ by entry."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(torch.sin(x)))


class Functional(nn.Module):
    """F.linear and F.conv2d on parameters of the model's own."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(12, 8, 3, 3) * 0.2)
        self.w = nn.Parameter(torch.randn(10, 12) * 0.3)
        self.b = nn.Parameter(torch.randn(10) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.kernel, stride=2, padding=1)
        return F.linear(torch.tanh(x).mean((2, 3)), self.w, self.b)


class CalledTwice(nn.Module):
    """One linear applied several times."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(10, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(torch.tanh(self.inner(torch.tanh(self.inner(x)))))


class SharedLinears(nn.Module):
    """Two linears with one weight and biases of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(10, 10), nn.Linear(10, 10)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class Tied(nn.Module):
    """An embedding whose weight is also the output head's, and a linear between them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(20, 12), nn.Linear(12, 12), nn.Linear(12, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.embed(tokens))))


class Modal(nn.Module):
    """Dropout and batch norm: training and evaluation differ, and buffers change in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.drop, self.head = nn.Dropout(0.4), nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(F.relu(self.norm(self.conv(x))).mean((2, 3))))


@dataclass(frozen=True)
class Case:
    """A model, its example inputs, and the sites that must be found in it."""

    name: str
    model: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    sites: tuple[str, ...] = ("layer.weight",)
    conv: bool = False


def _layer(name: str, make: Callable[[], nn.Module], *shape: int) -> Case:
    conv = name.startswith("conv")
    return Case(name, lambda: OneLayer(make()), lambda: torch.randn(*shape), conv=conv)


CASES: tuple[Case, ...] = (
    _layer("linear", lambda: nn.Linear(12, 9), 5, 12),
    _layer("linear without bias on three dimensions", lambda: nn.Linear(9, 14, bias=False), 3, 4, 9),
    _layer("conv1d", lambda: nn.Conv1d(6, 8, 3, padding=1), 2, 6, 11),
    _layer("conv1d dilated grouped", lambda: nn.Conv1d(8, 12, 3, dilation=2, groups=2, bias=False), 2, 8, 13),
    _layer("conv2d", lambda: nn.Conv2d(6, 10, 3), 2, 6, 9, 8),
    _layer("conv2d strided padded", lambda: nn.Conv2d(6, 10, (3, 5), stride=(2, 1), padding=(1, 2)), 2, 6, 9, 8),
    _layer("conv2d same dilated", lambda: nn.Conv2d(6, 10, 3, padding="same", dilation=2), 2, 6, 9, 8),
    _layer("conv2d even same", lambda: nn.Conv2d(6, 10, (4, 2), padding="same"), 2, 6, 9, 8),
    _layer("conv2d grouped", lambda: nn.Conv2d(8, 12, 3, padding=1, groups=4, stride=2), 2, 8, 9, 8),
    _layer("conv2d circular", lambda: nn.Conv2d(6, 10, (3, 5), padding=(1, 2), padding_mode="circular"), 2, 6, 9, 8),
    _layer("conv2d reflect", lambda: nn.Conv2d(6, 10, 3, padding=2, padding_mode="reflect", stride=2), 2, 6, 9, 8),
    _layer(
        "conv2d replicate grouped",
        lambda: nn.Conv2d(6, 10, 3, padding=1, padding_mode="replicate", groups=2),
        2,
        6,
        9,
        8,
    ),
    _layer("conv2d 1x1", lambda: nn.Conv2d(6, 10, 1), 2, 6, 5, 4),
    _layer("conv3d", lambda: nn.Conv3d(4, 6, (3, 2, 3), padding=(1, 0, 1)), 2, 4, 5, 6, 7),
    _layer("conv3d grouped strided", lambda: nn.Conv3d(4, 8, 3, stride=(1, 2, 2), groups=2, bias=False), 2, 4, 5, 6, 7),
    Case("functional", Functional, lambda: torch.randn(2, 8, 9, 8), ("kernel", "w"), conv=True),
    Case("called three times", CalledTwice, lambda: torch.randn(5, 10), ("inner.weight",)),
    Case("shared linears", SharedLinears, lambda: torch.randn(5, 10), ("first.weight",)),
    Case("tied embedding", Tied, lambda: torch.randint(20, (3, 7)), ("mix.weight",)),
    Case("dropout and batch norm", Modal, lambda: torch.randn(4, 4, 6, 6), ("conv.weight", "head.weight"), conv=True),
)


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter and floating buffer away from its initial value, so that parity means something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.add_(torch.rand(tensor.shape, generator=generator).to(tensor.device, tensor.dtype) * 0.1)
    return model


def gradients(model: nn.Module, *args: Any) -> dict[str, Tensor]:
    """The gradients of the mean square of the output, by parameter name, aliases included."""
    model.zero_grad()
    model(*args).square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters(remove_duplicate=False) if p.grad is not None}
