"""Making a plan: what is factored at which rank by the choices given, and why the rest is not."""

from __future__ import annotations

import math

import pytest
import torch
from models import SharedLinears, Tied
from planning import Several, X, names, reasons, several
from torch import nn

import dynrank_fx as dr
from dynrank_fx.plan import find_sites


def test_every_matrix_is_planned_or_skipped_with_its_reason_in_the_order_of_the_model():
    plan = several()
    assert [(row.site.name, row.layout.name, row.rank) for row in plan.sites] == [
        ("stem.weight", "channel", 4),
        ("body.0.weight", "channel", 6),
        ("head.weight", "linear", 5),
        ("last.weight", "linear", 1),
    ]
    assert reasons(plan) == {"deep.weight": "depthwise convolution: rank 1 already"}
    assert reasons(several(rank=dr.Ratio(1.0))) == {
        "stem.weight": "rank 16 of 16x8x3x3 would cost no fewer parameters than dense (1,408 for 1,152)",
        "deep.weight": "depthwise convolution: rank 1 already",
        "body.0.weight": "rank 24 of 24x16x3x3 would cost no fewer parameters than dense (4,032 for 3,456)",
        "head.weight": "rank 20 of 20x24 would cost no fewer parameters than dense (880 for 480)",
        "last.weight": "rank 3 of 3x20 would cost no fewer parameters than dense (69 for 60)",
    }


def test_ranks_over_a_sites_limit_and_ranks_that_cost_more_leave_it_dense():
    plan = several(rank=dr.Fixed(10))
    assert reasons(plan)["last.weight"] == "rank 10 is over the limit of 3 for 3x20"
    assert names(plan) == ["stem.weight", "body.0.weight", "head.weight"]
    everything = several(rank=dr.Fixed(3), allow_unprofitable=True)
    assert names(everything) == ["stem.weight", "body.0.weight", "head.weight", "last.weight"]


def test_a_site_that_saves_parameters_but_no_flops_stays_dense():
    """With stride 2 the first, unstrided stage of the spatial layout works on more positions."""
    torch.manual_seed(0)
    net = dr.capture(nn.Sequential(nn.Conv2d(16, 16, 3, stride=2, padding=1)), (torch.zeros(1, 16, 16, 16),))
    options = {"rank": dr.Fixed(20), "conv_layout": dr.SpatialLayout}
    plan = dr.make_plan(net, example_inputs=(torch.zeros(1, 16, 16, 16),), **options)
    assert "rank 20 of 16x16x3x3 would cost no fewer FLOPs than dense" in reasons(plan)["0.weight"]
    assert names(dr.make_plan(net, **options)) == ["0.weight"], "without an example only parameters are known"


@pytest.mark.parametrize(
    ("include", "exclude", "left"),
    [
        ((), (), ["stem.weight", "body.0.weight", "head.weight", "last.weight"]),
        (("stem.weight",), (), ["stem.weight"]),
        (("stem",), (), ["stem.weight"]),
        (("*e*d*", "stem"), ("head",), ["stem.weight"]),
        (("body.*", "head"), (), ["body.0.weight", "head.weight"]),
        (("body.0",), (), ["body.0.weight"]),
        ((), ("s*", "[hl]*"), ["body.0.weight"]),
        ((), ("deep",), ["stem.weight", "body.0.weight", "head.weight", "last.weight"]),
    ],
)
def test_patterns_go_by_weight_name_or_module_name(include, exclude, left):
    plan = several(include=include, exclude=exclude)
    assert names(plan) == left
    others = reasons(plan)
    assert others.pop("deep.weight") == "depthwise convolution: rank 1 already"
    assert set(others) == {"stem.weight", "body.0.weight", "head.weight", "last.weight"} - set(left)
    assert set(others.values()) <= {"not among the names to include", "excluded by name"}


def test_patterns_go_by_alias_too_kept_or_skipped():
    x = (torch.zeros(2, 10),)
    shared = dr.capture(SharedLinears(), x)
    for pattern in ("first", "second", "second.weight"):
        plan = dr.make_plan(shared, dr.Fixed(2), x, exclude=[pattern])
        assert reasons(plan) == {"first.weight": "excluded by name"}
        assert plan.skipped[0].aliases == ("second.weight",)
        assert names(dr.make_plan(shared, dr.Fixed(2), x, include=[pattern])) == ["first.weight"]
    tied = dr.capture(Tied(), (torch.zeros(2, 5, dtype=torch.long),))
    assert names(dr.make_plan(tied, dr.Fixed(2), exclude=["head"])) == ["mix.weight"]
    assert "embed.weight = head.weight" in str(dr.make_plan(tied, dr.Fixed(2)))


@pytest.mark.parametrize("options", [{"include": ["conv9"]}, {"exclude": ["head.bias"]}, {"include": ["stem", "nope"]}])
def test_a_pattern_that_matches_nothing_raises_and_shows_names(options):
    with pytest.raises(dr.PlanError, match=r"matches no weight of the model; its weights are named like stem\.weight"):
        several(**options)


def test_one_pattern_needs_no_list():
    assert several(include="head") == several(include=["head"])
    assert several(exclude="s*") == several(exclude=["s*"])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"rank": 0.25}, r"0\.25 is no rank policy: give Ratio\(0\.25\), Fixed\(16\), Energy\(0\.95\)"),
        ({"rank": None}, "None is no rank policy"),
        ({"conv_layout": dr.InputLayout()}, r"give the class itself, without \(\): one of ChannelLayout"),
        (
            {"conv_layout": "spatial"},
            "'spatial' is no layout of convolutions: give one of ChannelLayout, InputLayout, SpatialLayout",
        ),
    ],
)
def test_choices_are_values_and_anything_else_is_refused_in_words(options, sentence):
    with pytest.raises(dr.PlanError, match=sentence):
        several(**options)


def test_ranks_are_rounded_up_to_a_multiple():
    assert [row.rank for row in several(multiple_of=4).sites] == [4, 8, 8]
    assert reasons(several(multiple_of=4))["last.weight"] == "rank 4 is over the limit of 3 for 3x20"
    assert "rank 8 is over the limit of 3" in reasons(several(multiple_of=8, rank=dr.Ratio(0.1)))["last.weight"]
    with pytest.raises(dr.PlanError, match="ranks cannot be multiples of 0; give 1 or more"):
        several(multiple_of=0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("policy", [dr.Fixed(2), dr.Energy(0.9)], ids=repr)
def test_non_finite_weights_of_a_site_are_refused_by_name(value, policy):
    model = Several()
    with torch.no_grad():
        model.head.weight[3, 5] = value
    sentence = "head.weight has non-finite weights.* exclude it"
    with pytest.raises(dr.PlanError, match=sentence):
        dr.transform(model, X, rank=policy)
    with pytest.raises(dr.PlanError, match=sentence):
        dr.transform(model, X, plan=several())
    net = dr.transform(model, X, rank=policy, exclude=["head"])
    assert "head.weight" in reasons(dr.plan_of(net))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_float_dtypes_are_planned_alike_and_keep_their_dtype(dtype):
    torch.manual_seed(0)
    x = (X[0].to(dtype),)
    net = dr.transform(Several().to(dtype), x)
    assert str(dr.plan_of(net)) == str(several())
    dr.enter_(net, dr.Phase.LOW)
    assert {p.dtype for p in net.parameters()} == {dtype}
    assert bool(torch.isfinite(net(*x)).all())


def test_make_plan_changes_nothing_in_the_net():
    torch.manual_seed(0)
    net = dr.capture(Several(), X)
    before, code = {name: t.clone() for name, t in net.state_dict().items()}, net.code
    modes = [module.training for module in net.modules()]
    dr.make_plan(net, dr.Energy(0.9), X)
    find_sites(net)
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    assert net.code == code
    assert [module.training for module in net.modules()] == modes
    assert all(p.grad is None for p in net.parameters())
