"""The whole way from a model to a net with sites in one call, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from planning import Several, X, several
from torch import nn

import dynrank_fx as dr


def test_a_rank_over_every_limit_raises_and_a_plan_without_sites_is_refused_by_transform():
    with pytest.raises(dr.PlanError, match="rank 100 is over the limit of every site \\(the largest is 24\\)"):
        several(rank=dr.Fixed(100))
    with pytest.raises(
        dr.PlanError,
        match=r"nothing would be factored: stem.weight .*, deep.weight .*, and 2 more; choose other weights",
    ):
        dr.transform(Several(), X, rank=dr.Ratio(1.0))
    with pytest.raises(dr.PlanError, match="nothing would be factored: the model has no matrix"):
        dr.transform(nn.ReLU(), (torch.zeros(2, 3),))
    net = dr.transform(Several(), X, rank=dr.Ratio(1.0), allow_empty=True)
    assert not dr.plan_of(net).sites


def test_options_beside_a_given_plan_are_refused_not_ignored() -> None:
    plan = dr.plan_of(dr.transform(Several(), X))
    for given in ({"options": dr.PlanOptions()}, {"rank": dr.Fixed(2)}):
        with pytest.raises(dr.PlanError, match="a given plan says what is factored"):
            dr.transform(Several(), X, plan=plan, **given)


def test_it_is_capture_plan_and_factorize_in_one_and_leaves_the_model_alone():
    torch.manual_seed(0)
    model = Several()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    net = dr.transform(model, X, rank=dr.Fixed(2))
    captured = dr.capture(model, X)
    plan = dr.make_plan(captured, dr.Fixed(2), X)
    assert dr.plan_of(net) == plan
    assert net.code == dr.factorize(captured, plan).code
    x = torch.randn(3, 8, 9, 8)
    assert torch.equal(net(x), model(x))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(type(module).__module__.startswith("dynrank_fx") for module in model.modules())


def test_what_was_transformed_is_not_transformed_again():
    net = dr.transform(nn.Sequential(nn.Linear(16, 16)), rank=dr.Fixed(2))
    for given in (net, nn.Sequential(net)):
        with pytest.raises(dr.PlanError, match=r"has been transformed already: change its ranks by replan_, or"):
            dr.transform(given, rank=dr.Fixed(2))
    dr.enter_(net, dr.Phase.LOW)
    again = dr.transform(dr.truncate(net), rank=dr.Fixed(1))
    assert len(dr.plan_of(again).sites) == 2, "what truncate makes of it may be"


def test_without_an_example_nothing_is_counted_and_nothing_else_is_lost():
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh())
    net = dr.transform(model, rank=dr.Fixed(2))
    assert (dr.plan_of(net).total_flops, dr.plan_of(net).low_flops) == (None, None)
    assert torch.equal(net(torch.ones(2, 16)), model(torch.ones(2, 16)))
