"""A training in a plain loop, which the callbacks for other trainers must repeat."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dynrank_fx as dr

SCHEDULE = dr.schedules.FullBetween(1, 3)


class InTurn:
    """LOW and FULL in turn, in ticks within epochs where those are few."""

    within_epochs = True

    def __call__(self, state: dr.TrainState) -> dr.Phase:
        return dr.Phase.FULL if state.epoch % 4 > 1 else dr.Phase.LOW


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(24, 16, generator=generator), torch.randint(8, (24,), generator=generator))


def a_net() -> nn.Module:
    torch.manual_seed(0)
    return dr.transform(nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8)), (torch.randn(4, 16),))


def reference(epochs: int, schedule: Any = SCHEDULE, batch: int = 8) -> nn.Module:
    """The same training in a plain loop."""
    net = a_net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    loader = DataLoader(data(), batch)
    phases = dr.Phases(
        net, optimizer, schedule, epochs, scheduler, steps=len(loader), decay=dr.Decay.PRODUCT, landing=True
    )
    for epoch in range(epochs):
        phases.begin(epoch)
        for x, y in loader:
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        scheduler.step()
    if schedule is SCHEDULE:
        assert [record.phase for record in phases.history] == ["LOW", "FULL", "FULL", "LOW", "LOW"][:epochs]
    return net


def assert_same(a: nn.Module, b: nn.Module) -> None:
    for (name, mine), theirs in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def assert_near(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """The same to 1e-5: products of factors, since singular vectors may have either sign."""
    assert a.keys() == b.keys()
    for name in a:
        if name.endswith("right"):
            continue
        mine, its = (
            s[name] @ s[name.removesuffix("left") + "right"] if name.endswith("left") else s[name] for s in (a, b)
        )
        assert float((mine - its).norm()) < 1e-5 * float(its.norm()), name
