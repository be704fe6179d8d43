"""A training that has diverged is told by the name of what is not finite, before a checkpoint of it is gone on from."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dynrank_fx as dr


@pytest.mark.parametrize(
    "what", ["running_var", "momentum_buffer", "weight"], ids=["a buffer", "the optimizer's state", "a weight"]
)
def test_a_state_of_a_training_that_has_diverged_is_told(what: str) -> None:
    torch.manual_seed(0)
    net = dr.transform(nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Linear(16, 8)), (torch.zeros(2, 12),))
    net.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    phases = dr.Phases(net, optimizer, dr.schedules.always(dr.Phase.FULL), 2)
    phases.begin(0)
    net(torch.randn(4, 12)).square().sum().backward()
    optimizer.step()
    assert phases.diverged() is None
    phases.state_dict()  # without a word of the mask, which was so before
    momentum = optimizer.state[next(net.parameters())]["momentum_buffer"]
    {
        "running_var": dict(net.named_buffers())["1.running_var"],
        "momentum_buffer": momentum,
        "weight": dict(net.named_parameters())["2.weight"].data,
    }[what][0] = torch.nan if what != "running_var" else torch.inf
    found = {"momentum_buffer": "the optimizer's momentum_buffer of 0.weight", "weight": "2.weight"}
    assert phases.diverged() == found.get(what, "1.running_var")
    with pytest.warns(dr.DynrankWarning, match=f"^{phases.diverged()} is not finite, as in a training that has"):
        phases.state_dict()
