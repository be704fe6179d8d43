"""CIFAR-10 and CIFAR-100 from the user's own folder, in the binary format in which they are published, and their task.

The archives `cifar-10-binary.tar.gz` and `cifar-100-binary.tar.gz` unpack to the folders `cifar-10-batches-bin` and
`cifar-100-binary`. A record is its labels (one byte, or two in CIFAR-100: coarse and fine) and 3072 bytes of pixels,
channel by channel, row by row. The environment variables CIFAR10 and CIFAR100 name the folders.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

PIXELS = 3 * 32 * 32
FILES = {
    "CIFAR10": ([f"data_batch_{i}.bin" for i in range(1, 6)], ["test_batch.bin"], 1),
    "CIFAR100": (["train.bin"], ["test.bin"], 2),
}


def folder_of(name: str) -> Path:
    """The folder that the environment variable CIFAR10 or CIFAR100 names. Raises FileNotFoundError in words."""
    folder = os.environ.get(name)
    if not folder:
        raise FileNotFoundError(f"set the environment variable {name} to the folder of the data in binary format")
    return Path(folder)


def read(name: str, folder: Path, *, train: bool) -> tuple[Tensor, Tensor]:
    """Images [n, 3, 32, 32] of bytes and labels [n] (the fine ones of CIFAR-100).

    Raises FileNotFoundError for a missing file, ValueError for one that is cut off or holds impossible labels.
    """
    training, test, labels = FILES[name]
    classes, images, targets = 10 if labels == 1 else 100, [], []
    for file in training if train else test:
        path = folder / file
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: give the folder that the published binary archive unpacks to")
        data = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
        if data.numel() == 0 or data.numel() % (labels + PIXELS):
            raise ValueError(f"{path} is cut off: its records have {labels + PIXELS} bytes, and it has {data.numel()}")
        records = data.view(-1, labels + PIXELS)
        if int(records[:, labels - 1].max()) >= classes:
            raise ValueError(
                f"{path} holds a label of {int(records[:, labels - 1].max())}: it is not {name} in binary format"
            )
        images.append(records[:, labels:].reshape(-1, 3, 32, 32))
        targets.append(records[:, labels - 1].long())
    return torch.cat(images), torch.cat(targets)


class Batches:
    """Batches of (images, labels), normalised; shuffled, shifted by up to 4 pixels and mirrored where ``augment``.

    Random numbers are from torch's global generator, so that a resumed run repeats them.
    """

    def __init__(self, images: Tensor, labels: Tensor, batch_size: int, *, augment: bool) -> None:
        self.images, self.labels, self.batch_size, self.augment = images, labels, batch_size, augment
        sample = images[:10_000].float() / 255
        self.mean, self.std = (t.view(1, 3, 1, 1) for t in (sample.mean((0, 2, 3)), sample.std((0, 2, 3))))

    def __len__(self) -> int:
        return len(self.labels) // self.batch_size if self.augment else -(-len(self.labels) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.labels)) if self.augment else torch.arange(len(self.labels))
        for i in range(len(self)):
            chosen = order[i * self.batch_size : (i + 1) * self.batch_size]
            images = (self.images[chosen].float() / 255 - self.mean) / self.std
            yield (_moved(images) if self.augment else images), self.labels[chosen]


def _moved(images: Tensor) -> Tensor:
    """Each image shifted by up to 4 pixels in both directions, half of them mirrored."""
    n = len(images)
    padded = F.pad(images, (4, 4, 4, 4))
    rows, columns = (torch.randint(9, (n, 1)) + torch.arange(32) for _ in range(2))
    cut = padded[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    return torch.where((torch.rand(n) < 0.5).view(n, 1, 1, 1), cut.flip(-1), cut)


def batches(name: str, batch_size: int, *, train: bool) -> Batches:
    """The training set, augmented, or the test set."""
    return Batches(*read(name, folder_of(name), train=train), batch_size, augment=train)


def loss(output: Tensor, batch: Sequence[Tensor]) -> Tensor:
    """Cross-entropy with the paper's label smoothing."""
    return F.cross_entropy(output, batch[1], label_smoothing=0.1)


def metric(output: Tensor, batch: Sequence[Tensor]) -> Tensor:
    """Accuracy."""
    return (output.argmax(1) == batch[1]).float().mean()
