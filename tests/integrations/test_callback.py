"""What the callbacks of all trainers share: the practical preset's choices, and the net within a model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dynrank_fx as dr
from dynrank_fx.integrations.callback import PhasesHolder, net_in
from dynrank_fx.training import PhaseSettings, practical


def test_choices_are_the_practical_presets_but_for_those_that_are_made() -> None:
    schedule = dr.schedules.auto(0.6)
    assert PhasesHolder(schedule).settings == PhaseSettings(**practical().choices)
    made = PhasesHolder(schedule, rewarm=3, landing=False)
    assert made.settings == PhaseSettings(**practical().choices | {"rewarm": 3, "landing": False})
    assert (made.schedule, made.history) == (schedule, [])
    with pytest.raises(TypeError, match="amp"):
        PhasesHolder(schedule, amp=True)


def test_the_net_is_the_outermost_that_has_sites() -> None:
    net = dr.transform(nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 8)), (torch.randn(2, 16),))
    assert net_in(net) is net
    assert net_in(nn.Sequential(nn.Flatten(), nn.ModuleDict({"inner": net}))) is net
    captured = dr.capture(nn.Sequential(nn.Tanh()), (torch.randn(2, 16),))
    for model in (nn.Linear(16, 8), captured):
        with pytest.raises(dr.TransitionError, match=r"^the model holds no net with sites"):
            net_in(model)
