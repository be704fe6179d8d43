"""The state of optimizers by names: whatever they keep comes back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpointing import ADAPTOR, FULL, LOW, X, Y, made, unequal
from torch import nn
from torch.optim import SGD, Adafactor, Optimizer

import dynrank_fx as dr


@pytest.mark.parametrize("kind", [SGD, Adafactor])
def test_other_optimizers_and_adaptors_and_averages(kind: type[Optimizer], tmp_path: Path) -> None:
    def begin() -> tuple[nn.Module, nn.Module, dr.Phases]:
        net = made()
        average = torch.optim.swa_utils.AveragedModel(net)
        more = {"momentum": 0.9} if kind is SGD else {}
        optimizer = kind(net.parameters(), lr=0.05, **more)  # type: ignore[call-arg]
        schedule = lambda state: {"first": FULL, "inner": (LOW, ADAPTOR, FULL)[state.epoch % 3]}  # noqa: E731
        return net, average, dr.Phases(net, optimizer, schedule, steps=12, every=2, averages=average)

    def train(net: nn.Module, average: Any, phases: dr.Phases, steps: int) -> None:
        for _ in range(steps):
            phases.optimizer.zero_grad()
            nn.functional.mse_loss(net(X), Y).backward()
            phases.optimizer.step()
            average.update_parameters(net)

    for stop in (3, 5):
        net, average, phases = begin()
        train(net, average, phases, stop)
        dr.save_checkpoint(tmp_path / "saved", net, phases=phases)
        train(net, average, phases, 4)
        again, of_again, phases = begin()
        dr.load_checkpoint_(tmp_path / "saved", again, phases=phases)
        train(again, of_again, phases, 4)
        assert unequal(again.state_dict(), net.state_dict()) == []
        assert unequal(of_again.state_dict(), average.state_dict()) == []
