"""Checkpoints of a loop of one's own: training goes on from them as if it had not been stopped, by any processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

import dynrank_fx as dr

FULL, LOW, ADAPTOR = dr.Phase.FULL, dr.Phase.LOW, dr.Phase.ADAPTOR
X = torch.randn(64, 12, generator=torch.Generator().manual_seed(1))
Y = X.roll(3, 1)[:, :8].contiguous()
STEPS = 16


class Small(nn.Module):
    """Two sites, one of them tied; what a site is not: a bias, a norm with buffers, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.drop = nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Dropout(0.2)
        self.inner, self.again = nn.Linear(16, 16), nn.Linear(16, 16)
        self.again.weight = self.inner.weight
        self.last = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(torch.tanh(self.norm(self.first(x))))
        return self.last(torch.tanh(self.again(torch.tanh(self.inner(x)))))


def made(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return dr.transform(Small(), (X[:4],), rank=dr.Fixed(3), exclude=["last"], **options)


class Training:
    """A loop of one's own, with all that it goes on from."""

    def __init__(self, resume: dict[str, Any] | None = None, kind: type[Optimizer] = AdamW) -> None:
        self.net = made()
        biases = [p for name, p in self.net.named_parameters() if name.endswith("bias")]
        others = [p for name, p in self.net.named_parameters() if not name.endswith("bias")]
        self.optimizer = kind([{"params": others, "weight_decay": 0.1}, {"params": biases}], lr=0.01)
        self.rates = CosineAnnealingLR(self.optimizer, STEPS)
        schedule = dr.schedules.interleave(low=1, full=1)
        self.phases = dr.Phases(
            self.net, self.optimizer, schedule, lr_scheduler=self.rates, steps=STEPS, every=4, landing=True, rewarm=3
        )

    def train(self, steps: range) -> list[float]:
        losses = []
        for step in steps:
            at = slice(step % 4 * 16, step % 4 * 16 + 16)
            self.optimizer.zero_grad()
            loss = nn.functional.mse_loss(self.net(X[at]), Y[at])
            loss.backward()
            self.optimizer.step()
            self.rates.step()
            losses.append(loss.item())
        return losses

    def save(self, folder: Path, **more: Any) -> None:
        dr.save_checkpoint(folder, self.net, phases=self.phases, **more)

    def load(self, folder: Path) -> dict[str, Any]:
        return dr.load_checkpoint_(folder, self.net, phases=self.phases).extra


def state(training: Training) -> dict[str, Tensor]:
    moments = {
        f"{name} {key}": value
        for name, p in training.net.named_parameters()
        for key, value in training.optimizer.state[p].items()
    }
    return {**training.net.state_dict(), **moments}


def same(one: Training, other: Training) -> None:
    ours, theirs = state(one), state(other)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("stop", [0, 3, 4, 7, 9, 13])
def test_training_goes_on_bit_by_bit_wherever_it_stopped(stop: int, tmp_path: Path) -> None:
    whole = Training()
    expected = whole.train(range(STEPS))
    first = Training()
    losses = first.train(range(stop))
    first.save(tmp_path / "saved", extra={"step": stop, "of mine": torch.arange(3)})
    torch.manual_seed(5)
    again = Training()
    again.train(range(2))  # it has gone elsewhere
    extra = again.load(tmp_path / "saved")
    assert (extra["step"], extra["of mine"].tolist()) == (stop, [0, 1, 2])
    assert dr.phases_of(again.net) == dr.phases_of(first.net)
    losses += again.train(range(stop, STEPS))
    assert losses == expected
    same(again, whole)
