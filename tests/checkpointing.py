"""Trainings that checkpoints are made of, in one process and in several."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

import dynrank_fx as dr

FULL, LOW, ADAPTOR = dr.Phase.FULL, dr.Phase.LOW, dr.Phase.ADAPTOR
X = torch.randn(64, 12, generator=torch.Generator().manual_seed(1))
Y = X.roll(3, 1)[:, :8].contiguous()
STEPS = 16
Wrap = Callable[[nn.Module], nn.Module]


class Small(nn.Module):
    """Three weights, one of two layers; biases; and where it is to be noisy, a norm with buffers, and dropout."""

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
        whole: bool = False,
    ) -> None:
        """whole: with all that a run can have, dropout and averages of batches too."""
        self.rank, self.count = rank, count
        self.net = wrap(made(whole))
        biases = [p for name, p in self.net.named_parameters() if name.endswith("bias")]
        others = [p for name, p in self.net.named_parameters() if not name.endswith("bias")]
        self.optimizer = kind([{"params": others, "weight_decay": 0.1}, {"params": biases}], lr=0.01)  # type: ignore[call-arg]
        self.rates = CosineAnnealingLR(self.optimizer, STEPS)
        schedule = dr.schedules.interleave(low=1, full=1)
        self.phases = dr.Phases(
            self.net,
            self.optimizer,
            schedule,
            lr_scheduler=self.rates,
            steps=STEPS,
            every=4,
            landing=whole,
            rewarm=3,
            spectra=whole,
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


def ddp(net: nn.Module) -> nn.Module:
    return DistributedDataParallel(net)


def sharded(net: nn.Module) -> nn.Module:
    """By FSDP2: one site alone, the others with all the rest."""
    fully_shard(net.first)  # type: ignore[arg-type]
    fully_shard(net)
    return net


class Numbered:
    """A training of which every number says which save it belongs to."""

    def __init__(self, wrap: Wrap = lambda net: net) -> None:
        self.net = wrap(made())
        self.optimizer = AdamW(self.net.parameters(), lr=0.01)
        nn.functional.mse_loss(self.net(X), Y).backward()
        self.optimizer.step()

    @torch.no_grad()
    def save(self, folder: Path, number: int) -> None:
        for p in self.net.parameters():
            p.fill_(number)
            self.optimizer.state[p]["exp_avg"].fill_(number)
        dr.save_checkpoint(folder, self.net, self.optimizer, extra={"number": number})

    def load(self, folder: Path) -> int:
        """The number of the checkpoint, all of which is of one save."""
        number = dr.load_checkpoint_(folder, self.net, self.optimizer).extra["number"]
        numbers = [*self.net.parameters(), *(self.optimizer.state[p]["exp_avg"] for p in self.net.parameters())]
        assert {int(value) for each in numbers for value in whole(each.detach()).flatten()} == {number}
        return int(number)


def refusal(action: Callable[[], object]) -> str:
    with pytest.raises(dr.DynrankError) as caught:
        action()
    return str(caught.value)


def broken(file: Path) -> None:
    """One bit of the file is another, in the middle."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
