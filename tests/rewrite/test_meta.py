"""The plan of a net, and the code that it runs in its present phases and ranks."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import dynrank_fx as dr
from dynrank_fx.rewrite import a_twin, set_layouts_, set_plan, specialize_


def test_what_was_not_factored_has_no_plan_and_no_inside():
    for verb in (dr.plan_of, dr.inline, dr.truncate):
        with pytest.raises(dr.PlanError, match=r"Linear .*was not made by transform or factorize"):
            verb(nn.Linear(3, 3))


def net_of() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 8))
    return dr.transform(model, (torch.randn(2, 8),), rank=dr.Fixed(2))


def test_the_plan_is_found_behind_copies_and_compiled_wrappers_with_the_present_ranks():
    net = net_of()
    plan = dr.plan_of(net)
    assert dr.plan_of(copy.deepcopy(net)) == plan
    assert dr.plan_of(torch.compile(net, backend="eager")) is plan
    dr.replan_(net, plan.with_ranks({"0.weight": 3}))
    assert [row.rank for row in dr.plan_of(net).sites] == [3, 2]
    set_plan(net, plan)
    assert dr.plan_of(net) is plan


def test_a_captured_net_that_was_not_factored_has_no_plan():
    with pytest.raises(dr.PlanError, match=r"^Sequential has no plan: it was not made by transform or factorize$"):
        dr.plan_of(dr.capture(nn.Sequential(nn.Linear(4, 4))))


def test_phases_and_ranks_are_settings_with_a_code_of_their_own():
    net, codes = net_of(), []
    plan = dr.plan_of(net)
    for phase, rank in ((dr.Phase.FULL, 2), (dr.Phase.LOW, 2), (dr.Phase.LOW, 3), (dr.Phase.LOW, 2)):
        dr.enter_(net, phase)
        dr.replan_(net, plan.with_ranks({"0.weight": rank}))
        codes.append(type(net).forward.__code__)
        specialize_(net)
        assert type(net).forward.__code__ is codes[-1], "the setting is the same"
    assert codes[1] is codes[3]
    assert len({id(code) for code in codes}) == 3


def test_a_twin_shares_the_values_and_changes_phase_by_itself():
    net = net_of()
    expected = copy.deepcopy(net).eval()(torch.ones(3, 8))
    twin = a_twin(net)
    assert net.training
    assert not any(module.training for module in twin.modules())
    assert [p.data_ptr() for p in twin.parameters()] == [p.data_ptr() for p in net.parameters()]
    dr.enter_(twin, dr.Phase.LOW)
    assert set(dr.phases_of(net).values()) == {dr.Phase.FULL}
    assert torch.equal(net.eval()(torch.ones(3, 8)), expected)
    with pytest.raises(dr.PlanError, match=r"^Linear cannot be truncated: it was not made by transform or factorize$"):
        a_twin(nn.Linear(2, 2))


def test_sites_in_full_take_another_layout_and_compute_what_they_did() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)), torch.randn(2, 8, 7, 7)
    net = dr.transform(model, (x,), rank=dr.Fixed(8), allow_unprofitable=True)
    set_layouts_(net, {"1.weight": dr.InputLayout()})
    assert [row.layout.name for row in dr.plan_of(net).sites] == ["channel", "input"]
    assert torch.equal(net(x), model(x))
    dr.enter_(net, dr.Phase.LOW)
    assert tuple(net.get_submodule("1").right.shape) == (8, 8, 1, 1)
    torch.testing.assert_close(net(x), model(x), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(dr.truncate(net)(x), net(x))
