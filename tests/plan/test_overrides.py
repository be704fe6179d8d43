"""What is decided for single sites by name, over what holds for all."""

from __future__ import annotations

import pytest
import torch
from planning import reasons, several
from torch import nn

import dynrank_fx as dr
from dynrank_fx.plan.overrides import override_of
from dynrank_fx.plan.site import Site


def test_overrides_decide_for_single_sites_by_name_or_pattern():
    plan = several(
        overrides={
            "*": dr.Override(rank=dr.Ratio(0.5)),
            "body.*": dr.Override(layout=dr.SpatialLayout, rank=dr.Fixed(3)),
            "stem.weight": dr.Override(dense=True),
            "body.0": dr.Override(rank=dr.Fixed(5)),
        }
    )
    assert [(row.site.name, row.layout.name, row.rank) for row in plan.sites] == [
        ("body.0.weight", "spatial", 5),
        ("head.weight", "linear", 10),
        ("last.weight", "linear", 1),
    ]
    assert reasons(plan)["stem.weight"] == "left alone by name"
    assert several(overrides={"head": dr.Override()}) == several()


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"nothing": dr.Override(dense=True)}, "the pattern 'nothing' matches no weight of the model"),
        ({"head": dr.Fixed(3)}, r"the override of 'head' is Fixed\(rank=3\): give an Override"),
    ],
)
def test_an_override_that_is_none_or_matches_nothing_is_refused(overrides, sentence):
    with pytest.raises(dr.PlanError, match=sentence):
        several(overrides=overrides)
    with pytest.raises(dr.PlanError, match=r"0\.5 is no rank policy"):
        dr.Override(rank=0.5)
    with pytest.raises(dr.PlanError, match="'spatial' is no layout of convolutions"):
        dr.Override(layout="spatial")


def test_what_is_no_override_or_asks_for_what_cannot_be_is_refused_in_words():
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.zeros(2, 8)
    with pytest.raises(dr.PlanError, match="overrides are a dict from patterns to Override, not a list"):
        dr.transform(model, (x,), overrides=["0"])
    with pytest.raises(dr.PlanError, match="'no' does not say whether sites stay dense"):
        dr.Override(dense="no")
    with pytest.raises(dr.PlanError, match=r"override of '\*' asks for a layout of convolutions, and fits no conv"):
        dr.transform(model, (x,), overrides={"*": dr.Override(layout=dr.SpatialLayout)})
    overrides = {"*": dr.Override(dense=True), "0": dr.Override(dense=False)}
    net = dr.transform(model, (x,), rank=dr.Fixed(2), overrides=overrides)
    assert [row.site.name for row in dr.plan_of(net).sites] == ["0.weight"]


def test_what_the_fitting_patterns_say_is_put_together_and_the_later_one_wins():
    rank, other = dr.Fixed(3), dr.Ratio(0.5)
    overrides = {
        "*": dr.Override(rank=rank, dense=True),
        "head": dr.Override(layout=dr.TuckerLayout),
        "blocks.*": dr.Override(rank=other),
        "tied": dr.Override(dense=False),
    }
    one = Site("blocks.0.weight", (4, 4), (), ("tied.weight",))
    assert override_of(one, overrides) == dr.Override(rank=other, dense=False), "a pattern fits an alias too"
    assert override_of(Site("head.weight", (4, 4), ()), overrides) == dr.Override(rank, dr.TuckerLayout, True)
    assert override_of(one, dict(reversed(overrides.items()))) == dr.Override(rank=rank, dense=True)
    assert override_of(one, {"other": dr.Override(dense=True)}) == dr.Override()
