"""A model whose factors the tests of training look at: two linears that read one input, and a grouped convolution."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.conv = nn.Linear(12, 12), nn.Linear(12, 12), nn.Conv1d(12, 12, 3, padding=1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv((self.a(x) * torch.tanh(self.b(x))).mT)
