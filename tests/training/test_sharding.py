"""A net and an optimizer in parts hold together what they held whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from several import in_processes
from torch import nn

import dynrank_fx as dr
from dynrank_fx.processes import is_part, started
from dynrank_fx.training import shard_
from dynrank_fx.training.sharding import gathered


class Tied(nn.Module):
    """Layers of which two share a weight, with a buffer; sizes that two processes do not divide."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(9, 9), nn.Linear(9, 9), nn.Linear(9, 5)
        self.two.weight = self.one.weight
        self.register_buffer("shift", torch.ones(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.three(self.two(torch.tanh(self.one(x)))) + self.shift


def made() -> tuple[nn.Module, torch.optim.Optimizer]:
    """In LOW but for one site, after a step."""
    torch.manual_seed(0)
    net = dr.transform(Tied(), (torch.zeros(2, 9),), rank=dr.Fixed(3), leave=(), allow_unprofitable=True)
    biases = [p for name, p in net.named_parameters() if name.endswith("bias")]
    others = [p for name, p in net.named_parameters() if not name.endswith("bias")]
    optimizer = torch.optim.AdamW([{"params": others}, {"params": biases, "weight_decay": 0.0}], lr=0.1)
    dr.enter_(net, {"three.weight": dr.Phase.LOW}, optimizer)
    net(torch.ones(4, 9)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    return net, optimizer


def _sharded(rank: int) -> dict[str, Any]:
    net, optimizer = made()
    expected, state = net.state_dict(), optimizer.state_dict()
    values, output = {name: value.clone() for name, value in expected.items()}, net(torch.ones(4, 9)).detach()
    shard_(net, optimizer, "cpu")
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    found, found_state = gathered(net.state_dict()), gathered(optimizer.state_dict())
    assert isinstance(found, dict)
    return {
        "parts": all(map(is_part, net.parameters())) and all(map(is_part, trained)),
        "same objects": {id(p) for p in trained} == {id(p) for p in net.parameters()},
        "here": sum(p.to_local().numel() for p in net.parameters()) / sum(p.numel() for p in net.parameters()),
        "output": torch.allclose(net(torch.ones(4, 9)), output),
        "values": rank > 0 or all(torch.equal(found[name], values[name]) for name in values),
        "state": (state, found_state) if started().first else None,
    }


def test_parts_are_of_what_was_there() -> None:
    for done in in_processes(_sharded):
        assert done["parts"]
        assert done["same objects"]
        assert done["here"] < 0.65
        assert done["output"]
        assert done["values"]
        if done["state"] is not None:
            expected, found = done["state"]
            assert found["param_groups"] == expected["param_groups"]
            torch.testing.assert_close(found["state"], expected["state"], rtol=0, atol=0)


def test_one_process_has_nobody_to_share_with() -> None:
    with pytest.raises(dr.DynrankError, match=r"^there are no processes to share the net's parameters: start it by"):
        shard_(*made(), "cpu")
    value = {"a": [torch.ones(2), 3], "b": (None, "c")}
    assert gathered(value) == value
