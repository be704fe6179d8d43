"""The weight moves of a switch: all or none, in bounded memory."""

from __future__ import annotations

import weakref

import pytest
import torch
from switching import assert_same, chain, snapshot, trained
from torch import nn

import dynrank_fx as dr
from dynrank_fx.phases import switch
from dynrank_fx.rewrite import switched_modules


@pytest.mark.parametrize("start", list(dr.Phase))
@pytest.mark.parametrize(
    "error", [RuntimeError("out of memory"), KeyboardInterrupt(), OSError(28, "No space left on device")]
)
def test_a_failure_midway_undoes_the_sites_already_switched(start, error, monkeypatch):
    net = chain(4)
    dr.enter_(net, start)
    optimizer = trained(net)
    before, output = snapshot(net, optimizer), net(torch.ones(2, 16))
    places = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    names = iter(range(10))
    real = switch.replace_parameters

    def fails_at_the_third(*args, **kwargs):
        if next(names) == 2:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(switch, "replace_parameters", fails_at_the_third)
    expected = dr.TransitionError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected):
        dr.enter_(net, dr.Phase.LOW if start is dr.Phase.FULL else dr.Phase.FULL, optimizer)
    assert_same(net, optimizer, before)
    assert torch.equal(net(torch.ones(2, 16)), output)
    assert [len(ids) for ids in places] == [len(group["params"]) for group in optimizer.param_groups]
    monkeypatch.undo()
    assert len(dr.enter_(net, dr.Phase.LOW if start is dr.Phase.FULL else dr.Phase.FULL, optimizer).changes) == 4


def test_each_sites_old_parameters_are_freed_before_the_next_site_changes(monkeypatch):
    net = chain(5)
    optimizer = trained(net)
    weights = [weakref.ref(modules[0].weight) for modules in switched_modules(net).values()]
    states = [weakref.ref(optimizer.state[ref()]["exp_avg"]) for ref in weights]
    alive: list[int] = []
    real = switch._made

    def counting(*args, **kwargs):
        alive.append(sum(ref() is not None for ref in weights))
        assert sum(ref() is not None for ref in states) == alive[-1]
        return real(*args, **kwargs)

    monkeypatch.setattr(switch, "_made", counting)
    dr.enter_(net, dr.Phase.LOW, optimizer)
    assert alive == [5, 4, 3, 2, 1]
    assert all(ref() is None for ref in weights)


def test_the_reported_error_is_that_of_the_discarded_singular_values():
    net = chain()
    weights = {name: modules[0].weight.detach().double() for name, modules in switched_modules(net).items()}
    result = dr.enter_(net, dr.Phase.LOW)
    for change in result.changes:
        s = torch.linalg.svdvals(weights[change.site])
        optimum = s[4:].square().sum().sqrt() / s.square().sum().sqrt()
        assert change.error == pytest.approx(float(optimum), rel=1e-3)
        assert (change.before, change.after) == (dr.Phase.FULL, dr.Phase.LOW)
        assert (change.replaced, change.by) == (("weight",), ("left", "right"))
    assert all(change.error == 0 for change in dr.enter_(net, dr.Phase.FULL).changes)
    assert not dr.enter_(net, dr.Phase.FULL)


def test_a_replan_that_fails_midway_is_undone_as_a_whole(monkeypatch):
    net = chain()
    optimizer = trained(net)
    dr.enter_(net, dr.Phase.LOW, optimizer)
    before, plan = snapshot(net, optimizer), dr.plan_of(net)
    calls = iter(range(10))
    real = switch.replace_parameters

    def fails_in_the_second_site(*args, **kwargs):
        if next(calls) == 3:
            raise RuntimeError("out of memory")
        return real(*args, **kwargs)

    monkeypatch.setattr(switch, "replace_parameters", fails_in_the_second_site)
    with pytest.raises(RuntimeError, match="out of memory"):
        dr.replan_(net, plan.with_ranks({"0.weight": 2, "2.weight": 3}), optimizer)
    assert_same(net, optimizer, before)
    assert dr.plan_of(net) == plan
    assert [modules[0].rank for modules in switched_modules(net).values()] == [4, 4, 4]


def test_tied_modules_switch_together_and_their_state_is_carried_once():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
    model[2].weight = model[0].weight
    net = dr.transform(model, (torch.randn(2, 16),))
    optimizer = trained(net)
    dr.enter_(net, dr.Phase.LOW, optimizer)
    first, second = net.get_submodule("0"), net.get_submodule("2")
    assert all(a is b for a, b in zip(first.factors, second.factors, strict=True))
    assert len(list(net.parameters())) == 4
    assert first.bias is not second.bias
    dr.enter_(net, dr.Phase.FULL, optimizer)
    assert first.weight is second.weight


def test_frozen_sites_switch_and_stay_frozen():
    net = chain()
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    dr.enter_(net, dr.Phase.LOW)
    assert not any(p.requires_grad for p in net.parameters())
