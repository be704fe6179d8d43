"""Inline: a net with sites as a plain graph of ordinary nodes, with nothing of this package left."""

from __future__ import annotations

import copy

import pytest
import torch
from capturing import both_captures
from models import CASES, randomized
from torch import Tensor, fx, nn

import dynrank_fx as dr


@both_captures
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_inline_gives_a_plain_module_that_computes_the_same_in_both_phases(case, how):
    torch.manual_seed(0)
    model, x = randomized(case.model()), case.inputs()
    net = dr.transform(model, (x,), rank=dr.Fixed(2), how=how, allow_unprofitable=True)
    for phase in (dr.Phase.FULL, dr.Phase.LOW):
        dr.enter_(net, phase)
        for mode in (True, False):
            plain = dr.inline(net.train(mode))
            assert type(plain).__mro__[1] is fx.GraphModule
            assert not any(type(module).__module__.startswith("dynrank_fx") for module in plain.modules())
            assert plain.training == mode
            assert plain.meta == {}
            plain.graph.lint()
            mine, theirs = copy.deepcopy(net), plain
            torch.manual_seed(1)
            expected = mine(x)
            torch.manual_seed(1)
            assert torch.equal(theirs(x), expected)
            used = {node.target for node in plain.graph.nodes if node.op == "get_attr"}
            assert all(node.users for node in plain.graph.nodes if node.op == "get_attr"), "no dead reads"
            assert (
                used
                <= {name for name, _ in plain.named_parameters(remove_duplicate=False)}
                | dict(plain.named_buffers()).keys()
            )


class Updating(nn.Module):
    """A running mean that no node of the graph reads afterwards, in one mode only."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        x = self.fc(x)
        if self.training:
            self.mean.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        return x


@both_captures
def test_updates_of_buffers_that_nothing_reads_survive_every_rewrite(how):
    torch.manual_seed(0)
    model, x = Updating(), torch.randn(5, 8)
    net = dr.transform(model, (x,), rank=dr.Fixed(8), how=how, allow_unprofitable=True)
    for phase in (dr.Phase.FULL, dr.Phase.LOW):
        dr.enter_(net, phase)
        plain = dr.inline(net.train())
        for each in (net, plain, model.train()):
            each(x)
        for each in (net, plain):
            torch.testing.assert_close(each.mean, model.mean)
            assert int(each.calls) == int(model.calls)
    small = dr.truncate(net)
    before = int(small.calls)
    small(x)
    assert int(small.calls) == before + 1
