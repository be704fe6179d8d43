"""What the tests of plans share: a model with something of everything, and its plan."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import dynrank_fx as dr


class Several(nn.Module):
    """Two convolutions, a depthwise one, a classifier, and a matrix too small to factor."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.deep = nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.body = nn.Sequential(nn.Conv2d(16, 24, 3, stride=2), nn.ReLU())
        self.head, self.last = nn.Linear(24, 20), nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(torch.relu(self.deep(torch.relu(self.stem(x)))))
        return self.last(torch.tanh(self.head(x.mean((2, 3)))))


X = (torch.zeros(2, 8, 9, 8),)


@functools.cache
def _captured() -> nn.Module:
    torch.manual_seed(0)
    return dr.capture(Several(), X)


def several(**options: Any) -> dr.Plan:
    options = {"rank": dr.Ratio(0.25)} | options
    return dr.make_plan(_captured(), example_inputs=X, **options)


def names(plan: dr.Plan) -> list[str]:
    return [row.site.name for row in plan.sites]


def reasons(plan: dr.Plan) -> dict[str, str]:
    return {skipped.name: skipped.reason for skipped in plan.skipped}


def edited(change: Callable[[dict[str, Any]], object]) -> str:
    data = json.loads(several().to_json())
    change(data)
    return json.dumps(data)


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(40, 40), nn.Linear(40, 40), nn.Linear(40, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.b(torch.tanh(self.a(x)))))


def steep() -> Perceptron:
    """One weight of rank about 4, one whose spectrum falls slowly."""
    torch.manual_seed(0)
    model = Perceptron()
    with torch.no_grad():
        model.a.weight.copy_(torch.randn(40, 4) @ torch.randn(4, 40) + 0.01 * torch.randn(40, 40))
        U, V = (torch.nn.init.orthogonal_(torch.empty(40, 40)) for _ in range(2))
        model.b.weight.copy_(U @ torch.diag(torch.linspace(1, 0.1, 40)) @ V)
    return model
