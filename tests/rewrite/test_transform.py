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
