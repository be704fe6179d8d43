"""A model file: the paper's second experiment, WRN-28-10 on CIFAR-100 (arXiv 2508.08625; network: arXiv 1605.07146).

    CIFAR100=folder dynrank-fx train samples/wrn28.py --schedule paper-cifar100 \
        --leave shortcut --leave head --exclude 'stages.0.0.conv1'

Batch 128, 200 epochs, learning rate 0.1 and a tenth of it at epochs 150 and 180, momentum 0.9, weight decay 5e-4,
dropout 0.3, label smoothing 0.1. The first block's first convolution stays dense, as in the paper's code.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import torch
import torch.nn.functional as F
from cifar import Batches, batches, loss, metric
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import MultiStepLR

__all__ = ["loss", "metric"]

epochs = 200
MILESTONES = (150, 180)
DEPTH, WIDTH = 28, 10


class Block(nn.Module):
    """Norm, activation and 3×3 convolution, twice, with dropout between, beside a shortcut (pre-activation)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.drop = nn.Dropout(0.3)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        same = stride == 1 and inputs == outputs
        self.shortcut: nn.Module = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(x))
        z = self.conv2(self.drop(F.relu(self.norm2(self.conv1(y)))))
        return z + self.shortcut(y if isinstance(self.shortcut, nn.Conv2d) else x)


class WideResNet(nn.Module):
    """Images [batch, 3, 32, 32] to class scores [batch, classes]; ``depth`` is 6 n + 4."""

    def __init__(self, depth: int = DEPTH, width: int = WIDTH, classes: int = 100) -> None:
        super().__init__()
        count = (depth - 4) // 6
        widths = [16, 16 * width, 32 * width, 64 * width]
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.stages = nn.Sequential(
            *(
                nn.Sequential(
                    Block(inputs, outputs, 1 if i == 0 else 2),
                    *(Block(outputs, outputs, 1) for _ in range(count - 1)),
                )
                for i, (inputs, outputs) in enumerate(pairwise(widths))
            )
        )
        self.norm, self.head = nn.BatchNorm2d(widths[-1]), nn.Linear(widths[-1], classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.stages(self.stem(images)))).mean((2, 3)))


def model() -> nn.Module:
    return WideResNet()


def example_inputs() -> tuple[Tensor]:
    return (torch.zeros(2, 3, 32, 32),)


def train_data() -> Batches:
    return batches("CIFAR100", 128, train=True)


def eval_data() -> Batches:
    return batches("CIFAR100", 500, train=False)


def optimizer(parameters: Iterable[nn.Parameter]) -> Optimizer:
    return SGD(parameters, lr=0.1, momentum=0.9, weight_decay=5e-4)


def lr_scheduler(optimizer: Optimizer) -> MultiStepLR:
    """Stepped once per epoch."""
    return MultiStepLR(optimizer, milestones=MILESTONES, gamma=0.1)
