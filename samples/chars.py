"""A model file: a small character-level transformer on source text of Python's standard library.

The text is on every machine that runs Python, so nothing is downloaded; its words differ a little between versions
of Python. The learning rate follows half a cosine over all epochs.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

epochs = 12

MODULES = ("argparse", "configparser", "dataclasses", "functools", "inspect", "optparse")
CHARACTERS = 96  # newline, and ASCII from space to tilde
CONTEXT, WIDTH, HEADS, LAYERS = 64, 128, 4, 3
BATCH, STEPS = 32, 100


class Attention(nn.Module):
    """Causal self-attention, [batch, time, width] to the same."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Attention and a two-layer perceptron, each added to a normalised input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class CharTransformer(nn.Module):
    """Characters [batch, time] to scores of the character after each, [batch, time, CHARACTERS]; time <= CONTEXT."""

    def __init__(self, width: int = WIDTH, heads: int = HEADS, layers: int = LAYERS) -> None:
        super().__init__()
        self.embed = nn.Embedding(CHARACTERS, width)
        self.positions = nn.Parameter(0.02 * torch.randn(CONTEXT, width))
        self.layers = nn.Sequential(*(Layer(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CHARACTERS)

    def forward(self, characters: Tensor) -> Tensor:
        x = self.embed(characters) + self.positions[: characters.shape[1]]
        return self.head(self.norm(self.layers(x)))


def model() -> nn.Module:
    return CharTransformer()


def narrower(share: float) -> nn.Module:
    """The model so many times as wide, for `dynrank-fx pilot`: the dense model of as many FLOPs as the factored one."""
    return CharTransformer(HEADS * round(share * WIDTH / HEADS))


def example_inputs() -> tuple[Tensor]:
    return (torch.zeros(2, CONTEXT, dtype=torch.long),)


def train_data() -> DataLoader:
    """STEPS batches of windows from the first nine tenths of the text, drawn from torch's global generator."""
    characters = text()
    windows = _windows(characters[: len(characters) * 9 // 10], stride=1)
    sampler = RandomSampler(windows, replacement=True, num_samples=BATCH * STEPS)
    return DataLoader(windows, BATCH, sampler=sampler, drop_last=True)


def eval_data() -> DataLoader:
    """The last tenth in windows side by side, in batches of equal size."""
    characters = text()
    held_out = characters[len(characters) * 9 // 10 :]
    return DataLoader(_windows(held_out, stride=CONTEXT), BATCH, drop_last=True)


def loss(output: Tensor, batch: Sequence[Tensor]) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1), batch[1].flatten())


def metric(output: Tensor, batch: Sequence[Tensor]) -> Tensor:
    """How often the likeliest character is the one that follows."""
    return (output.argmax(-1) == batch[1]).float().mean()


def optimizer(parameters: Iterable[nn.Parameter]) -> Optimizer:
    return AdamW(parameters, lr=2e-3, weight_decay=0.01)


def lr_scheduler(optimizer: Optimizer) -> CosineAnnealingLR:
    """Stepped once per epoch."""
    return CosineAnnealingLR(optimizer, T_max=epochs)


def text() -> Tensor:
    """At most 400,000 characters, as numbers: newline is 0, space 1, tilde 95; what is not ASCII is left out."""
    folder = Path(sysconfig.get_path("stdlib"))
    source = b"".join((folder / f"{name}.py").read_bytes() for name in MODULES)
    codes = torch.tensor(list(source)) - 31
    codes[codes == ord("\n") - 31] = 0
    return codes[(codes >= 0) & (codes < CHARACTERS)][:400_000]


def _windows(characters: Tensor, stride: int) -> TensorDataset:
    """Pairs of CONTEXT characters and the same moved on by one, as views of the text."""
    pieces = characters.unfold(0, CONTEXT + 1, stride)
    return TensorDataset(pieces[:, :-1], pieces[:, 1:])
