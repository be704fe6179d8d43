"""Inline: a net with sites as a plain graph of ordinary nodes, with nothing of this package left."""

from __future__ import annotations

import copy

import pytest
import torch
from capturing import both_captures
from models import CASES, randomized
from torch import Tensor, fx, nn

import dynrank_fx as dr
from dynrank_fx.rewrite import holds_captured, inline_


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


# Where only parts were captured, and beside them


class Around(nn.Module):
    """Untraced code around a captured part and a single layer, with buffers that are saved and that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.layer = nn.Sequential(nn.Linear(8, 8), Shifted()), nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.part(x) if float(x.detach().sum()) < 1e9 else x
        return self.layer(x)


class Shifted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", torch.ones(8))
        self.register_buffer("passing", torch.ones(8), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.kept + self.passing


def around() -> tuple[nn.Module, nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = Around(), torch.randn(3, 8)
    return dr.transform(model, (x,), rank=dr.Fixed(2), how=dr.Capture.MODULES), model, x


@pytest.mark.parametrize("phase", list(dr.Phase), ids=lambda phase: phase.name)
def test_parts_and_single_layers_become_plain_inside_the_models_own_class(phase):
    net, model, x = around()
    dr.enter_(net, phase)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1)
    plain = dr.inline(net)
    assert type(plain) is Around
    assert torch.equal(plain(x), net(x))
    assert not any(type(module).__module__.startswith("dynrank_fx") for module in plain.modules())
    assert not [name for name in vars(plain) if "dynrank" in name]
    assert holds_captured(net), "the net stays as it is"
    assert not holds_captured(plain)
    assert not holds_captured(model)
    assert sorted(plain.state_dict()) == sorted(net.state_dict())
    assert {name for name, _ in plain.named_buffers()} >= {"part.1.kept", "part.1.passing"}


def test_in_place_it_takes_over_the_parameters_of_the_net():
    net, _, x = around()
    expected, held = net(x), {name: id(p) for name, p in net.named_parameters()}
    plain = inline_(net)
    assert {name: id(p) for name, p in plain.named_parameters()} == held
    assert torch.equal(plain(x), expected)


class Weighed(nn.Module):
    """Reads the values and the shape of its weight beside the product."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.fc.weight.square().sum() + self.fc.weight.shape[1]


@pytest.mark.parametrize("phase", list(dr.Phase), ids=lambda phase: phase.name)
def test_reads_of_a_weight_become_ordinary_nodes_with_the_same_gradients(phase):
    torch.manual_seed(0)
    net, x = dr.transform(Weighed().double(), rank=dr.Fixed(2)), torch.randn(3, 8).double()
    dr.enter_(net, phase)
    plain = dr.inline(net)
    for each in (net, plain):
        each(x).square().sum().backward()
    torch.testing.assert_close(plain(x), net(x))
    found = dict(plain.named_parameters())
    assert found.keys() == dict(net.named_parameters()).keys()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(found[name].grad, parameter.grad)
