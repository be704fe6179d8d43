"""What the parts of `samples/measure.py` share: the device, a Markdown table, a training step, the task of a sample."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from dynrank_fx.training import Task

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    for line in (head, ["---"] * len(head), *rows):
        print("| " + " | ".join(map(str, line)) + " |")


def stepper(model: nn.Module, sample: ModuleType, batch: list[Tensor]) -> Callable[[], None]:
    """One training step on one batch, forward to optimizer."""
    optimizer = sample.optimizer(model.parameters())
    forward = torch.compile(model, fullgraph=True, dynamic=False)

    def step() -> None:
        sample.loss(forward(batch[0]), batch).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step.optimizer = optimizer  # type: ignore[attr-defined]
    return step


def timed(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def task_of(sample: ModuleType) -> Task:
    """What a model file trains on."""
    return Task(sample.train_data(), sample.loss, lambda batch: ((batch[0],), {}), sample.eval_data(), sample.metric)
