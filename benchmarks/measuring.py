"""What the benchmarks share: the samples that they measure, the device, a training step, a time."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import dynrank_fx as dr
from dynrank_fx.training import Task

sys.path.append(str(Path(__file__).parents[1] / "samples"))
import chars
import digits
import gpt  # noqa: F401  (others take it from here)
import pitch  # noqa: F401  (the same)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Sample:
    """A model file, and what stays dense of its model."""

    name: str
    module: ModuleType
    exclude: tuple[str, ...]

    def model(self) -> nn.Module:
        model: nn.Module = self.module.model()
        return model.to(DEVICE)

    def batch(self) -> list[Tensor]:
        return [t.to(DEVICE) for t in next(iter(self.module.train_data()))]

    def transformed(self) -> nn.Module:
        """The model with its sites at rank 1/4, the plan's costs for a batch of training."""
        inputs = (self.batch()[0].cpu(),)
        return dr.transform(self.module.model(), inputs, rank=dr.Ratio(0.25), exclude=self.exclude).to(DEVICE)

    def optimizer(self, model: nn.Module) -> Optimizer:
        optimizer: Optimizer = self.module.optimizer(model.parameters())
        return optimizer

    def step(self, model: nn.Module, optimizer: Optimizer) -> Callable[[], None]:
        """One training step on one batch, forward (compiled) to optimizer."""
        batch = self.batch()
        forward = torch.compile(model, fullgraph=True, dynamic=False)

        def step() -> None:
            self.module.loss(forward(batch[0]), batch).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step


DIGITS = Sample("digits (conv, 64 and 128 channels, SGD)", digits, ("stem*", "*shortcut*", "head"))
CHARS = Sample("chars (transformer, d = 128, AdamW)", chars, ("embed",))
SAMPLES = (DIGITS, CHARS)


def timed(call: Callable[[], Any]) -> float:
    """Seconds of a call."""
    started = time.perf_counter()
    call()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def task_of(module: ModuleType) -> Task:
    """What a model file trains on."""
    return Task(module.train_data(), module.loss, lambda batch: ((batch[0],), {}), module.eval_data(), module.metric)
