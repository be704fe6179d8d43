"""A GPT of 57 million parameters on the bytes of every Python file that this machine's Python has: for a GPU.

Source text is on every machine that runs Python, so nothing is downloaded; how much of it there is differs.
"""

from __future__ import annotations

import functools
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import chars
import torch
from torch import Tensor, nn

BYTES, CONTEXT = 256, 512
WIDTH, HEADS, LAYERS = 768, 12, 8
BATCH, STEPS, EVAL_BATCHES = 64, 60, 16
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class GPT(nn.Module):
    """Bytes [batch, time] to scores of the byte after each, [batch, time, BYTES]; time <= CONTEXT."""

    def __init__(self, width: int = WIDTH, heads: int = HEADS, layers: int = LAYERS) -> None:
        super().__init__()
        self.embed = nn.Embedding(BYTES, width)
        self.positions = nn.Parameter(0.02 * torch.randn(CONTEXT, width))
        self.layers = nn.Sequential(*(chars.Layer(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, BYTES)

    def forward(self, text: Tensor) -> Tensor:
        x = self.embed(text) + self.positions[: text.shape[1]]
        return self.head(self.norm(self.layers(x)))


@dataclass(frozen=True)
class Windows:
    """Batches of windows of a text [bytes] and the same moved on by one, drawn from torch's global generator, or side
    by side.
    """

    text: Tensor
    batches: int
    size: int = BATCH
    random: bool = True

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        windows = self.text.unfold(0, CONTEXT + 1, 1)
        for i in range(self.batches):
            if self.random:
                at = torch.randint(len(windows), (self.size,)).to(self.text.device)
            else:
                at = torch.arange(i * self.size, (i + 1) * self.size, device=self.text.device) * CONTEXT
            pieces = windows[at].long()
            yield pieces[:, :-1], pieces[:, 1:]


@functools.cache
def text() -> tuple[Tensor, Tensor]:
    """Bytes of all files but every hundredth, and of those, in the order of their names: to train on and held out. On
    the GPU where there is one.
    """
    folders = {Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")}
    files = sorted({file for folder in folders for file in folder.rglob("*.py") if file.is_file()})
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for number, file in enumerate(files):
        parts[number % 100 == 0].append(file.read_bytes())
    train, held_out = (torch.frombuffer(bytearray(b"".join(each)), dtype=torch.uint8).to(DEVICE) for each in parts)
    return train, held_out


def model() -> nn.Module:
    return GPT()


def train_data() -> Windows:
    return Windows(text()[0], STEPS)


def eval_data() -> Windows:
    held_out = text()[1]
    return Windows(held_out, min(EVAL_BATCHES, len(held_out) // (CONTEXT * BATCH) - 1), random=False)


loss, metric = chars.loss, chars.metric
