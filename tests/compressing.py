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


class SaidTimes(SiteTimes):
    """Times that a test says: of a site factored, over dense, at any rank."""

    def __init__(self, ratios: dict[str, float]) -> None:
        super().__init__(cache=None)
        self.ratios = ratios

    def cost(self, rows: Any, total: float) -> Cost:
        ratio = self.ratios.get(rows[0].site.name, 0.5)
        return Cost(0.2, lambda rank: 0.2 * ratio)
