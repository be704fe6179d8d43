"""A vision task that tells methods apart: scenes of several handwritten digits, of which all are to be read.

Each scene is made of scikit-learn's real digits, scaled, turned a little and laid over one another, with scraps of
others as clutter, on a background that is not even, with noise. What is asked is which digits are there. No digit image
of the training scenes is in a held-out one.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from benchmarks.measuring import digits as sample

SIZE = 32
MOST = 4
"""Digits in a scene: from 2 to so many."""
SCRAPS = 6
LARGEST = 22
"""Pixels of the side of the largest digit; the smallest has 13. Their outer pixels are empty."""
JITTER = 3
HELD_OUT = 2048


class Reader(nn.Module):
    """ResNet-20 (arXiv 1512.03385) at width 16. Scenes [batch, 1, SIZE, SIZE] to scores of each digit [batch, 10]."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        shapes = [(width, width, 1), (width, 2 * width, 2), (2 * width, 4 * width, 2)]
        self.stages = nn.Sequential(
            *(
                nn.Sequential(
                    sample.Block(inputs, outputs, stride), *(sample.Block(outputs, outputs, 1) for _ in range(2))
                )
                for inputs, outputs, stride in shapes
            )
        )
        self.head = nn.Linear(4 * width, 10)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.stages(self.stem(images.contiguous(memory_format=torch.channels_last)))
        return self.head(features.mean((2, 3)))


class WideReader(nn.Module):
    """A wide residual network (arXiv 1605.07146) of 10 layers, WRN-10-2 at width 32. Scenes as in ``Reader``."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        shapes = [(16, width, 1), (width, 2 * width, 2), (2 * width, 4 * width, 2)]
        self.blocks = nn.Sequential(*(WideBlock(*shape) for shape in shapes))
        self.norm, self.head = nn.BatchNorm2d(4 * width), nn.Linear(4 * width, 10)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.blocks(self.stem(images.contiguous(memory_format=torch.channels_last)))
        return self.head(F.relu(self.norm(features)).mean((2, 3)))


class WideBlock(nn.Module):
    """Two 3×3 convolutions, each of what is normalised before it, beside a 1×1 one."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(x))
        return self.shortcut(x) + self.conv2(F.relu(self.norm2(self.conv1(x))))


class Scenes:
    """Batches of (images [batch, 1, SIZE, SIZE], whether each digit is there [batch, 10]), new ones in every epoch.

    seed: of scenes that are the same in every epoch; None draws them from torch's global generator.
    """

    def __init__(self, digits: tuple[Tensor, Tensor], batch_size: int, batches: int, seed: int | None = None) -> None:
        self.digits, self.batch_size, self.batches, self.seed = digits, batch_size, batches, seed

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = None if self.seed is None else torch.Generator().manual_seed(self.seed)
        for _ in range(self.batches):
            yield scenes(*self.digits, self.batch_size, generator)


def train_data(batch_size: int = 64, batches: int = 100) -> Scenes:
    return Scenes(_split()[0], batch_size, batches)


@functools.cache
def eval_data(batch_size: int = 256) -> Sequence[tuple[Tensor, Tensor]]:
    return list(Scenes(_split()[1], batch_size, HELD_OUT // batch_size, seed=0))


def loss(output: Tensor, batch: Sequence[Tensor]) -> Tensor:
    return F.binary_cross_entropy_with_logits(output, batch[1])


def metric(output: Tensor, batch: Sequence[Tensor]) -> Tensor:
    """The share of the scenes in which every digit is found, and none that is not there."""
    return ((output > 0) == (batch[1] > 0)).all(1).float().mean()


def scenes(images: Tensor, labels: Tensor, count: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """images: [n, 1, 8, 8] from 0 to 1; labels: [n]."""
    shape = (count, MOST)
    present = torch.arange(MOST) < torch.randint(2, MOST + 1, (count, 1), generator=generator)
    chosen = torch.randint(len(images), shape, generator=generator)
    scraps = torch.randint(len(images), (count, SCRAPS), generator=generator)
    size = torch.cat([_between(13, LARGEST, shape, generator), _between(8, 14, (count, SCRAPS), generator)], 1)
    angle = _between(-0.35, 0.35, size.shape, generator)
    # A digit is in a quarter of its own, up to JITTER pixels off its middle; scraps are anywhere.
    quarter = torch.rand(shape, generator=generator).argsort(1)
    middle = SIZE / 4 + SIZE / 2 * torch.stack([quarter % 2, quarter // 2], -1)
    at = torch.cat(
        [middle + _between(-JITTER, JITTER, middle.shape, generator), _between(0, SIZE, (count, SCRAPS, 2), generator)],
        1,
    )
    parts = _placed(images[torch.cat([chosen, scraps], 1)], size, angle, at)
    # Of a scrap there is a strip through its middle: strokes, but no digit.
    mask = torch.zeros(8, 8)
    mask[:, 3:5] = 1
    parts[:, MOST:] = _placed(images[scraps] * mask, size[:, MOST:], 6 * angle[:, MOST:], at[:, MOST:])
    ink = _between(0.6, 1, (*size.shape, 1, 1), generator)
    ink[:, :MOST] *= present[..., None, None]
    scene = (parts * ink).amax(1, keepdim=True)
    slope = _between(-0.3, 0.3, (count, 2, 1, 1), generator)
    line = torch.linspace(-1, 1, SIZE)
    ground = slope[:, :1] * line + slope[:, 1:] * line[:, None]
    noise = 0.15 * torch.randn(count, 1, SIZE, SIZE, generator=generator)
    target = torch.zeros(count, 10).scatter_reduce(1, labels[chosen], present.float(), "amax")
    return 2 * scene - 0.5 + ground + noise, target


def _placed(digits: Tensor, size: Tensor, angle: Tensor, at: Tensor) -> Tensor:
    """[count, parts, 1, 8, 8] into scenes [count, parts, SIZE, SIZE], each at its size, angle and centre in pixels."""
    scale = SIZE / size
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    x, y = (1 - 2 * at / SIZE).unbind(-1)
    rows = [torch.stack([cos, -sin, cos * x - sin * y], -1), torch.stack([sin, cos, sin * x + cos * y], -1)]
    grid = F.affine_grid(torch.stack(rows, -2).flatten(0, 1), [size.numel(), 1, SIZE, SIZE], align_corners=False)
    return F.grid_sample(digits.flatten(0, 1), grid, align_corners=False).view(*size.shape, SIZE, SIZE)


def _between(low: float, high: float, shape: Sequence[int], generator: torch.Generator | None) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator)


@functools.cache
def _split() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    train, held_out = train_test_split(torch.arange(len(labels)), test_size=360, random_state=0, stratify=labels)
    return (images[train], labels[train]), (images[held_out], labels[held_out])
