"""A model file: the paper's first experiment, ResNet-20 on CIFAR-10 (arXiv 2508.08625; the network: arXiv 1512.03385).

    CIFAR10=folder dynrank-fx train samples/resnet20.py --schedule paper-cifar10 --leave shortcut --leave head

Batch 128, 150 epochs, learning rate 0.1 and a tenth of it at epochs 100 and 130, momentum 0.9, label smoothing 0.1.
Weight decay is 1e-4, as in arXiv 1512.03385: the paper's own is not known to us.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from blocks import Block
from cifar import Batches, batches, loss, metric
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import MultiStepLR

__all__ = ["loss", "metric"]

epochs = 150
MILESTONES = (100, 130)


class ResNet20(nn.Module):
    """Images [batch, 3, 32, 32] to class scores [batch, classes]: three stages of three blocks each."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        widths = [(16, 16, 1), (16, 32, 2), (32, 64, 2)]
        self.stages = nn.Sequential(
            *(
                nn.Sequential(Block(inputs, outputs, stride), *(Block(outputs, outputs, 1) for _ in range(2)))
                for inputs, outputs, stride in widths
            )
        )
        self.head = nn.Linear(64, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(images)).mean((2, 3)))


def model() -> nn.Module:
    return ResNet20()


def example_inputs() -> tuple[Tensor]:
    return (torch.zeros(2, 3, 32, 32),)


def train_data() -> Batches:
    return batches("CIFAR10", 128, train=True)


def eval_data() -> Batches:
    return batches("CIFAR10", 500, train=False)


def optimizer(parameters: Iterable[nn.Parameter]) -> Optimizer:
    return SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-4)


def lr_scheduler(optimizer: Optimizer) -> MultiStepLR:
    """Stepped once per epoch."""
    return MultiStepLR(optimizer, milestones=MILESTONES, gamma=0.1)
