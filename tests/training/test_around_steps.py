"""Hooks on both sides of a step: in order, for every optimizer, gone together, and idle where a step is skipped."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from factored_pair import Pair
from torch import nn

import dynrank_fx as dr
from dynrank_fx.training.around_steps import AroundSteps


class Noted(AroundSteps):
    def __init__(self, optimizers: list[torch.optim.Optimizer]) -> None:
        self.seen: list[object] = []
        super().__init__(optimizers)

    def _before(self, optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        self.seen.append(("before", optimizer))

    def _after(self, optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        self.seen.append(("after", optimizer))


def test_they_stand_on_both_sides_of_every_step_until_they_are_removed() -> None:
    one, other = (torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1) for _ in range(2))
    with Noted([one, other]) as hooks:
        one.step()
        other.step()
    one.step()
    assert hooks.seen == [("before", one), ("after", one), ("before", other), ("after", other)]
    assert not one._optimizer_step_pre_hooks
    assert not other._optimizer_step_post_hooks


@pytest.mark.parametrize("hooked", [dr.factor_decay_, dr.factor_steps_])
def test_a_step_that_a_scaler_skips_changes_nothing(hooked: Callable[..., AroundSteps]) -> None:
    torch.manual_seed(0)
    model, x = Pair(), torch.randn(5, 7, 12)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # so that steps of factors are shortened
    net = dr.transform(model, (x,), rank=dr.Ratio(0.5), allow_unprofitable=True)
    dr.enter_(net, dr.Phase.LOW)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05, weight_decay=0.3, fused=True)
    scaler = torch.amp.GradScaler("cpu")
    hooked(net, optimizer)
    before = [p.detach().clone() for p in net.parameters()]
    scaler.scale(net(x).square().mean() * torch.inf).backward()
    scaler.step(optimizer)
    assert all(torch.equal(p, old) for p, old in zip(net.parameters(), before, strict=True))
