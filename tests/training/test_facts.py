"""What a schedule is told: spectra as torch.linalg has them, and rates as the scheduler sets them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, lr_scheduler

import dynrank_fx as dr
from dynrank_fx.schedules import SiteState
from dynrank_fx.training.facts import planned_rates

FULL, LOW, ADAPTOR = dr.Phase.FULL, dr.Phase.LOW, dr.Phase.ADAPTOR


# The state


def a_net() -> nn.Module:
    torch.manual_seed(0)
    return dr.transform(nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32)), (torch.randn(4, 32),))


def test_the_state_of_a_net():
    net = a_net()
    optimizer = SGD(net.parameters(), lr=0.1)
    scheduler = lr_scheduler.MultiStepLR(optimizer, [2, 3])
    dr.enter_(net, {"0.weight": LOW})
    found = dr.train_state(net, optimizer, 1, 4, scheduler, rates=[0.2], spent=1.0)
    assert found.lrs == pytest.approx((0.2, 0.1, 0.1, 0.01))
    assert {name: site.phase for name, site in found.sites.items()} == {"0.weight": LOW, "2.weight": FULL}
    assert found.sites["0.weight"] == SiteState(LOW, 8, 0.5, 0.25, groups=1)
    expected = torch.linalg.svdvals(net.get_submodule("2").weight.detach().double())
    torch.testing.assert_close(torch.tensor(found.spectra["2.weight"], dtype=torch.float64), expected)


SCHEDULERS = {
    "none": lambda o: None,
    "steps": lambda o: lr_scheduler.MultiStepLR(o, [2, 4]),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 6),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.5**epoch),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.3, total_steps=7),
    "warm-up, then cosine": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=2), lr_scheduler.CosineAnnealingLR(o, 4)], [2]
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("make", [lambda p: SGD(p, lr=0.1, momentum=0.9), lambda p: AdamW(p, lr=0.1)])
def test_planned_rates_are_those_that_come(name, make):
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = make([parameter])
    scheduler = SCHEDULERS[name](optimizer)
    plans, came = [], []
    for epoch in range(6):
        plans.append(planned_rates(optimizer, scheduler, 6 - epoch))
        came.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    for epoch, plan in enumerate(plans):
        assert plan == pytest.approx(came[epoch:])


def test_rates_that_nobody_knows_yet_are_left_out():
    optimizer = SGD([nn.Parameter(torch.zeros(3))], lr=0.1)
    assert planned_rates(optimizer, lr_scheduler.ReduceLROnPlateau(optimizer), 5) == ()
    net = a_net()
    optimizer = SGD(net.parameters(), lr=0.1)
    found = dr.train_state(net, optimizer, 0, 4, lr_scheduler.ReduceLROnPlateau(optimizer))
    assert found.lrs == ()
    assert set(dr.schedules.auto()(found).phases.values()) == {FULL}


def test_asking_for_the_rates_changes_neither_the_scheduler_nor_the_optimizer() -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = AdamW([{"params": [parameter], "lr": 0.1}], weight_decay=0.1)
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, 6)
    parameter.grad = torch.ones(3)
    optimizer.step()
    before = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict(), parameter.detach()))
    planned_rates(optimizer, scheduler, 6, steps=2)
    after = (optimizer.state_dict(), scheduler.state_dict(), parameter.detach())
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert scheduler.optimizer is optimizer


def test_rates_of_a_scheduler_that_steps_within_the_epochs() -> None:
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    assert planned_rates(optimizer, scheduler, 3, steps=2) == pytest.approx((1.0, 0.25, 0.0625))


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ((-1, 3), "epoch -1 is none of a run of 3 epochs, which count from 0 to 2"),
        ((3, 3), "epoch 3 is none of a run of 3 epochs"),
        ((0, "3"), "a run cannot have '3' epochs: give a whole number of 1 or more"),
    ],
)
def test_epochs_that_cannot_be(given: tuple[Any, Any], sentence: str) -> None:
    net = dr.transform(nn.Linear(8, 8), (torch.randn(2, 8),), rank=dr.Fixed(2))
    with pytest.raises(dr.ScheduleError, match=sentence):
        dr.train_state(net, torch.optim.SGD(net.parameters(), lr=0.1), *given)
