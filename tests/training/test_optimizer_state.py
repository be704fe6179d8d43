"""The state of optimizers by names: whatever they keep comes back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpointing import ADAPTOR, FULL, LOW, X, Y, made, unequal
from torch import nn
from torch.optim import SGD, Adafactor, AdamW, Optimizer

import dynrank_fx as dr
from dynrank_fx.training.optimizer_state import named_state, restore_state_


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


def test_what_is_no_tensor_and_a_rate_that_is_one_come_back() -> None:
    net = nn.Linear(3, 2)
    names = {id(p): name for name, p in net.named_parameters()}
    optimizer = AdamW(net.parameters(), lr=torch.tensor(0.5), capturable=False, foreach=False)
    net(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    optimizer.state[net.bias]["mine"] = (3, "so")
    told, tensors = named_state([optimizer], names)
    again = AdamW(net.parameters(), lr=torch.tensor(0.1), foreach=False)
    made = restore_state_([again], told, names)
    assert made.keys() == tensors.keys()
    assert {name: each.shape for name, each in made.items()} == {name: each.shape for name, each in tensors.items()}
    assert again.param_groups[0]["lr"] == 0.5
    assert again.state[net.bias]["mine"] == (3, "so")
    assert restore_state_([again], (), names) == {}
    assert not again.state
