"""Phase changes and new ranks, by name and pattern, and what does not say which."""

from __future__ import annotations

import pytest
import torch
from switching import assert_same, chain, snapshot, trained
from torch import nn

import dynrank_fx as dr
from dynrank_fx.rewrite import switched_modules


def test_phases_per_site_by_name_and_pattern():
    net = chain()
    assert dr.enter_(net, {"0.*": dr.Phase.LOW, "2.weight": dr.Phase.LOW}).model is net
    assert [phase.name for phase in dr.phases_of(net).values()] == ["LOW", "FULL", "LOW"]
    with pytest.raises(dr.TransitionError, match=r"'head' matches no site"):
        dr.enter_(net, {"head": dr.Phase.LOW})


def test_replan_changes_ranks_in_both_phases_and_the_plan():
    net = chain()
    optimizer = trained(net)
    dr.enter_(net, {"0.weight": dr.Phase.LOW}, optimizer)
    before = switched_modules(net)["0.weight"][0].weight.detach()
    result = dr.replan_(net, dr.plan_of(net).with_ranks({"0.weight": 2, "1.weight": 7}), optimizer)
    assert [change.site for change in result.changes] == ["0.weight", "0.weight"], "inflated, then cut anew"
    left, right = switched_modules(net)["0.weight"][0].factors
    assert left.shape == (16, 2)
    s = torch.linalg.svdvals(before.double())
    torch.testing.assert_close(torch.linalg.norm(before - left @ right).double(), s[2:].norm(), rtol=1e-3, atol=1e-5)
    assert dr.phases_of(net)["0.weight"] is dr.Phase.LOW
    assert [row.rank for row in dr.plan_of(net).sites] == [2, 7, 4]
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in net.parameters()}
    dr.enter_(net, dr.Phase.LOW, optimizer)
    assert switched_modules(net)["1.weight"][0].factors[0].shape == (16, 7)
    with pytest.raises(dr.PlanError, match="other sites"):
        dr.replan_(net, dr.plan_of(dr.transform(nn.Linear(8, 8), (torch.randn(2, 8),))))


def test_a_replanned_adaptor_keeps_its_function_and_starts_another_branch():
    net = chain().double().eval()
    dr.enter_(net, dr.Phase.ADAPTOR)
    site, x = switched_modules(net)["0.weight"][0], torch.randn(3, 16, dtype=torch.float64)
    with torch.no_grad():
        site.factors[0].normal_()
    before = net(x)
    dr.replan_(net, dr.plan_of(net).with_ranks({"0.weight": 2}))
    assert [tuple(factor.shape) for factor in site.factors] == [(16, 2), (2, 16)]
    assert not site.factors[0].any()
    assert dr.phases_of(net)["0.weight"] is dr.Phase.ADAPTOR
    torch.testing.assert_close(net(x), before)


def test_a_failed_replan_leaves_ranks_plan_and_weights():
    net = chain()
    optimizer = trained(net)
    dr.enter_(net, dr.Phase.LOW, optimizer)
    before, plan = snapshot(net, optimizer), dr.plan_of(net)
    last = switched_modules(net)["2.weight"][0].factors[0]
    last.grad = torch.ones_like(last)
    with pytest.raises(dr.TransitionError, match="pending gradient"):
        dr.replan_(net, plan.with_ranks({"0.weight": 2, "2.weight": 3}), optimizer)
    last.grad = None
    assert_same(net, optimizer, before)
    assert dr.plan_of(net) == plan
    assert [modules[0].rank for modules in switched_modules(net).values()] == [4, 4, 4]


def test_a_compiled_net_can_be_given_in_place_of_the_net():
    net = chain()
    compiled = torch.compile(net, backend="eager")
    assert len(dr.enter_(compiled, dr.Phase.LOW).changes) == 3
    assert set(dr.phases_of(compiled).values()) == {dr.Phase.LOW}
    assert dr.plan_of(compiled) is dr.plan_of(net)


def test_what_does_not_say_what_becomes_of_the_state() -> None:
    net = dr.transform(nn.Linear(8, 8), (torch.randn(2, 8),), rank=dr.Fixed(2))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    sentence = r"^'reset' does not say what becomes of optimizer state: give one of Carry\.MOVE, Carry\.RESET$"
    for call in (
        lambda: dr.enter_(net, dr.Phase.LOW, optimizer, carry="reset"),
        lambda: dr.replan_(net, dr.reranked(net, dr.Fixed(1)), optimizer, carry="reset"),
    ):
        with pytest.raises(dr.TransitionError, match=sentence):
            call()
    with pytest.raises(dr.PlanError, match=r"0\.5 is no Plan: give what make_plan makes"):
        dr.replan_(net, 0.5, optimizer)
    with pytest.raises(dr.TransitionError, match="the pattern 3 matches no site; they are named like weight"):
        dr.enter_(net, {3: dr.Phase.LOW}, optimizer)
    assert dr.phases_of(net) == {"weight": dr.Phase.FULL}
    for ladder in (0, 2.5, "fine"):
        with pytest.raises(dr.PlanError, match=r"a grid of .* ranks cannot be: give ladder as a whole number"):
            dr.reranked(net, dr.Fixed(1), ladder=ladder)
