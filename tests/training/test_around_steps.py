"""Hooks on both sides of a step: in order, for every optimizer, and gone together."""

from __future__ import annotations

import torch
from torch import nn

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
