"""A model file: a residual convolution network on scikit-learn's handwritten digits, 1797 images of 8 x 8 pixels.

The data comes with scikit-learn, so nothing is downloaded. The learning rate falls at epochs 8 and 10 of 12, which is
what an aligned schedule needs, and at the same shares of any other number of epochs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from blocks import Block
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import MultiStepLR
from torch.utils.data import DataLoader, TensorDataset

epochs = 12
MILESTONES = (8, 10)

WIDTH = 64


class DigitNet(nn.Module):
    """Images [batch, 1, 8, 8] to class scores [batch, 10]."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.blocks = nn.Sequential(Block(width, width), Block(width, 2 * width, stride=2), Block(2 * width, 2 * width))
        self.head = nn.Linear(2 * width, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(images)).mean((2, 3)))


def model() -> nn.Module:
    return DigitNet()


def narrower(share: float) -> nn.Module:
    """The model so many times as wide, for `dynrank-fx pilot`: the dense model of as many FLOPs as the factored one."""
    return DigitNet(max(1, round(share * WIDTH)))


def example_inputs() -> tuple[Tensor]:
    return (torch.zeros(2, 1, 8, 8),)


def train_data() -> DataLoader:
    """1437 images in a new order each epoch, drawn from torch's global generator."""
    return DataLoader(_split()[0], batch_size=64, shuffle=True, drop_last=True)


def eval_data() -> DataLoader:
    """The other 360 images, in two equal batches."""
    return DataLoader(_split()[1], batch_size=180)


def loss(output: Tensor, batch: Sequence[Tensor]) -> Tensor:
    return F.cross_entropy(output, batch[1])


def metric(output: Tensor, batch: Sequence[Tensor]) -> Tensor:
    """Accuracy."""
    return (output.argmax(1) == batch[1]).float().mean()


def optimizer(parameters: Iterable[nn.Parameter]) -> Optimizer:
    return SGD(parameters, lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)


def lr_scheduler(optimizer: Optimizer) -> MultiStepLR:
    """Stepped once per epoch."""
    return MultiStepLR(optimizer, milestones=[epochs * milestone // 12 for milestone in MILESTONES], gamma=0.1)


def _split() -> tuple[TensorDataset, TensorDataset]:
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1  # 0..16 to -1..1
    labels = torch.tensor(digits.target)
    train, test = train_test_split(torch.arange(len(labels)), test_size=360, random_state=0, stratify=labels)
    return TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test])
