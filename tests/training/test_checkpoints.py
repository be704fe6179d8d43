"""Checkpoints of a loop of one's own: training goes on from them as if it had not been stopped, by any processes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adafactor, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

import dynrank_fx as dr
from tests.several import in_processes

FULL, LOW, ADAPTOR = dr.Phase.FULL, dr.Phase.LOW, dr.Phase.ADAPTOR
X = torch.randn(64, 12, generator=torch.Generator().manual_seed(1))
Y = X.roll(3, 1)[:, :8].contiguous()
STEPS = 16
Wrap = Callable[[nn.Module], nn.Module]


class Small(nn.Module):
    """Three sites, two of them tied; beside them biases and, where it is to be noisy, a norm with buffers and dropout."""

    def __init__(self, noisy: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(12, 16), nn.Linear(16, 8)
        self.inner, self.again = nn.Linear(16, 16), nn.Linear(16, 16)
        self.again.weight = self.inner.weight
        self.norm = nn.Sequential(nn.BatchNorm1d(16), nn.Dropout(0.2)) if noisy else nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(torch.tanh(self.first(x)))
        return self.last(torch.tanh(self.again(torch.tanh(self.inner(x)))))


def made(noisy: bool = False, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return dr.transform(Small(noisy), (X[:4],), **{"rank": dr.Fixed(3), "exclude": ["last"]} | options)


class Training:
    """A loop of one's own with all that it goes on from, in process ``rank`` of ``count``: each has its share of every
    batch, so that any number of them computes the same.
    """

    def __init__(
        self,
        rank: int = 0,
        count: int = 1,
        wrap: Wrap = lambda net: net,
        kind: type[Optimizer] = AdamW,
        noisy: bool = False,
    ) -> None:
        self.rank, self.count = rank, count
        self.net = wrap(made(noisy))
        biases = [p for name, p in self.net.named_parameters() if name.endswith("bias")]
        others = [p for name, p in self.net.named_parameters() if not name.endswith("bias")]
        self.optimizer = kind([{"params": others, "weight_decay": 0.1}, {"params": biases}], lr=0.01)  # type: ignore[call-arg]
        self.rates = CosineAnnealingLR(self.optimizer, STEPS)
        schedule = dr.schedules.interleave(low=1, full=1)
        self.phases = dr.Phases(
            self.net, self.optimizer, schedule, lr_scheduler=self.rates, steps=STEPS, every=4, landing=True, rewarm=3
        )
        torch.manual_seed(100 + rank)

    def train(self, steps: range) -> list[float]:
        losses, share = [], 16 // self.count
        for step in steps:
            start = step % 4 * 16 + self.rank * share
            self.optimizer.zero_grad()
            loss = nn.functional.mse_loss(self.net(X[start : start + share]), Y[start : start + share])
            loss.backward()
            self.optimizer.step()
            self.rates.step()
            losses.append(loss.item())
        return losses

    def save(self, folder: Path, **extra: Any) -> None:
        dr.save_checkpoint(folder, self.net, phases=self.phases, extra=extra)

    def load(self, folder: Path) -> dict[str, Any]:
        return dr.load_checkpoint_(folder, self.net, phases=self.phases).extra

    def state(self) -> dict[str, Tensor]:
        """All tensors, whole: of the net, and what the optimizer holds of each."""
        net = getattr(self.net, "module", self.net)
        moments = {
            f"{name} {key}": value
            for name, p in net.named_parameters()
            for key, value in self.optimizer.state[p].items()
            if isinstance(value, Tensor)
        }
        return {name: whole(each).clone() for name, each in {**net.state_dict(), **moments}.items()}


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, torch.distributed.tensor.DTensor) else tensor


def unequal(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], most: float = 0.0) -> list[str]:
    """The names of what is not the same, or differs by more than this."""
    assert ours.keys() == theirs.keys()
    return [name for name in ours if not float((ours[name].double() - theirs[name].double()).abs().max()) <= most]


@pytest.mark.parametrize("stop", [0, 3, 4, 9, 13])
def test_training_goes_on_bit_by_bit_wherever_it_stopped(stop: int, tmp_path: Path) -> None:
    expected, first, again = (Training(noisy=True) for _ in range(3))
    losses = expected.train(range(STEPS))
    torch.manual_seed(100)
    before = first.train(range(stop))
    first.save(tmp_path / "saved", step=stop, mine=torch.arange(3))
    again.train(range(2))  # it has gone elsewhere
    extra = again.load(tmp_path / "saved")
    assert (extra["step"], extra["mine"].tolist()) == (stop, [0, 1, 2])
    assert dr.phases_of(again.net) == dr.phases_of(first.net)
    assert before + again.train(range(stop, STEPS)) == losses
    assert unequal(again.state(), expected.state()) == []


def ddp(net: nn.Module) -> nn.Module:
    return DistributedDataParallel(net)


def across(rank: int, folder: Path, count: int) -> dict[str, Any]:
    found = {}
    told = Training(rank, count, ddp)  # a checkpoint of one process
    told.load(folder / "one")
    told.train(range(7, 9))
    found["from one"] = told.state()

    told.save(folder / "several", step=9)
    told.train(range(9, 11))
    found["two more"] = told.state()

    first = Training(rank, count, ddp, noisy=True)
    first.train(range(6))
    first.save(folder / "noisy")
    first.train(range(6, 10))
    again = Training(rank, count, ddp, noisy=True)
    again.load(folder / "noisy")
    again.train(range(6, 10))
    found["again"] = unequal(again.state(), first.state())

    found["refusals"] = []
    file = folder / "noisy" / f"__{count - 1}_0.distcp"
    before = again.state()
    if rank == 0:
        broken(file)
    with pytest.raises(dr.StoreError) as caught:
        again.load(folder / "noisy")
    found["refusals"].append(str(caught.value))
    found["untouched"] = unequal(again.state(), before)
    with pytest.raises(dr.StoreError) as caught:  # something in one process cannot be kept
        again.save(folder / "several", mine=object() if rank == 0 else 3)
    found["refusals"].append(str(caught.value))
    return found


def broken(file: Path) -> None:
    """One bit of the file is another, in the middle."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_any_number_of_processes_goes_on(tmp_path: Path, count: int = 2) -> None:
    one = Training()
    one.train(range(7))
    one.save(tmp_path / "one", step=7)
    one.train(range(7, 9))
    results = in_processes(across, tmp_path, count, count=count)
    assert unequal(results[0]["from one"], one.state(), 1e-6) == []
    again = Training()
    assert again.load(tmp_path / "several") == {"step": 9}
    again.train(range(9, 11))
    for found in results:
        assert unequal(found["from one"], results[0]["from one"]) == []
        assert unequal(again.state(), found["two more"], 1e-6) == []
        assert found["again"] == []
        assert found["untouched"] == []
        damaged, kept = found["refusals"]
        assert f"__{count - 1}_0.distcp is damaged, or of another checkpoint" in damaged
        assert "mine is a object" in kept
    assert not list(tmp_path.glob(".*"))
