"""A net that is made anew enters the phases and ranks of a checkpoint."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import SGD

import dynrank_fx as dr

FULL, LOW = dr.Phase.FULL, dr.Phase.LOW


def made() -> nn.Module:
    torch.manual_seed(0)
    return dr.transform(
        nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8)), (torch.randn(2, 12),), rank=dr.Fixed(2)
    )


def test_phases_and_ranks_are_those_of_the_state_whose_weights_then_load_by_name() -> None:
    net, again = made(), made()
    dr.replan_(net, dr.plan_of(net).with_ranks({"0.weight": 3}))
    phases = dr.Phases(net, SGD(net.parameters(), lr=0.1), lambda state: {"0.weight": LOW}, 2)
    phases.begin(0)
    dr.resume_phases_(again, phases.state_dict())
    assert dr.phases_of(again) == dr.phases_of(net) == {"0.weight": LOW, "2.weight": FULL}
    shapes = [{name: value.shape for name, value in each.state_dict().items()} for each in (net, again)]
    assert shapes[0] == shapes[1]


def test_a_state_from_before_the_first_epoch_changes_nothing() -> None:
    net = made()
    phases = dr.Phases(net, SGD(net.parameters(), lr=0.1), dr.schedules.always(LOW), 2)
    dr.resume_phases_(net, phases.state_dict())
    phases.load_state_dict(phases.state_dict())
    assert set(dr.phases_of(net).values()) == {FULL}
    assert phases.history == []
