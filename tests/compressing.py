"""A small trained-like model and its data, which the tests of compression share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dynrank_fx.compression import SiteTimes
from dynrank_fx.plan import Cost


def perceptron() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 48)).eval()


def batches() -> list[tuple[Tensor]]:
    """Four batches for it, whose numbers hang together."""
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(32, 32, generator=generator) * torch.linspace(0, 1, 32) ** 3
    return [(torch.randn(64, 32, generator=generator) @ mixing,) for _ in range(4)]


def params(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


class Pictured(nn.Module):
    """A convolution with a batch norm behind it, a dropout and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(torch.relu(self.norm(self.conv(x))).mean((2, 3))))


def pictures(count: int = 6) -> list[Any]:
    """Batches for it, whose mean is not zero."""
    torch.manual_seed(5)
    return [(torch.randn(16, 3, 8, 8) + 1,) for _ in range(count)]


class SaidTimes(SiteTimes):
    """Times that a test says: of a site factored, over dense, at any rank."""

    def __init__(self, ratios: dict[str, float]) -> None:
        super().__init__(cache=None)
        self.ratios = ratios

    def cost(self, rows: Any, total: float) -> Cost:
        ratio = self.ratios.get(rows[0].site.name, 0.5)
        return Cost(0.2, lambda rank: 0.2 * ratio)


def error(net: nn.Module, dense: nn.Module) -> float:
    """The squared distance of a net's outputs from the dense model's, over all batches."""
    with torch.no_grad():
        return sum(float((net(*b) - dense(*b)).square().sum()) for b in batches())
