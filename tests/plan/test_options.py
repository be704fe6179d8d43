"""PlanOptions: one value for every choice of planning, the same whichever way it is given."""

from __future__ import annotations

import dataclasses
import typing

import pytest
import torch
from torch import nn

import dynrank_fx as dr
from dynrank_fx.plan.options import PlanChoices

CHOICES = {
    "rank": dr.Ratio(0.5),
    "include": ["0", "2", "4"],
    "exclude": "4",
    "overrides": {"2": dr.Override(rank=dr.Fixed(3))},
    "multiple_of": 3,
    "conv_layout": dr.SpatialLayout,
    "share_inputs": True,
    "leave": (dr.Role.STEM,),
    "allow_unprofitable": True,
}
X = (torch.randn(2, 3, 8, 8),)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(256, 64), nn.Linear(64, 64)
    )


def test_keyword_arguments_are_the_fields() -> None:
    hints = typing.get_type_hints(PlanChoices)
    assert {field.name: hints[field.name] for field in dataclasses.fields(dr.PlanOptions)} == hints
    assert hints == {name: typing.get_type_hints(dr.PlanOptions)[name] for name in hints}
    assert CHOICES.keys() == hints.keys(), "every choice is tried below"


@pytest.mark.parametrize("name", CHOICES)
def test_a_choice_is_the_same_given_as_a_field_or_as_an_argument(name: str) -> None:
    choice = {name: CHOICES[name]}
    net = dr.capture(model(), X)
    plans = [
        dr.make_plan(net, dr.PlanOptions(**choice), X),
        dr.make_plan(net, example_inputs=X, **choice),
        dr.plan_of(dr.transform(model(), X, dr.PlanOptions(**choice))),
        dr.plan_of(dr.transform(model(), X, **choice)),
    ]
    assert plans[0] == plans[1] == plans[2] == plans[3]
    if name in ("share_inputs", "allow_unprofitable"):
        return  # no two linears of this model read one input, and every site of it pays
    assert plans[0] != dr.make_plan(net, example_inputs=X), "and it says something"


def test_arguments_go_before_the_options_and_leave_them_alone() -> None:
    options = dr.PlanOptions(rank=dr.Ratio(0.5), multiple_of=4)
    plan = dr.plan_of(dr.transform(model(), X, options, rank=dr.Fixed(6)))
    assert {row.rank for row in plan.sites} == {8}
    assert options == dr.PlanOptions(rank=dr.Ratio(0.5), multiple_of=4)


def test_a_policy_alone_is_short_for_options() -> None:
    net = dr.capture(model(), X)
    assert dr.make_plan(net, dr.Ratio(0.5), X) == dr.make_plan(net, dr.PlanOptions(rank=dr.Ratio(0.5)), X)


def test_one_pattern_may_stand_without_a_list() -> None:
    assert dr.PlanOptions(include="0", exclude="1") == dr.PlanOptions(include=["0"], exclude=("1",))
    assert dr.PlanOptions(leave=dr.Role.HEAD) == dr.PlanOptions(leave=(dr.Role.HEAD,))


@pytest.mark.parametrize(
    ("choice", "sentence"),
    [
        ({"rank": 4}, r"4 is no rank policy: give Ratio\(0\.25\)"),
        ({"multiple_of": 0}, "ranks cannot be multiples of 0; give 1 or more"),
        ({"multiple_of": 1.5}, r"ranks cannot be multiples of 1\.5; give 1 or more"),
        ({"conv_layout": "spatial"}, "'spatial' is no layout of convolutions: give one of ChannelLayout"),
        ({"overrides": [("a", 1)]}, "overrides are a dict from patterns to Override, not a list"),
        ({"overrides": {"a": 3}}, r"the override of 'a' is 3: give an Override"),
        ({"leave": ["stem"]}, r"'stem' is no role: give Role\.STEM"),
        ({"leave": "stem"}, r"'stem' is no role: give Role\.STEM, Role\.SHORTCUT, Role\.HEAD"),
        ({"leave": 3}, "3 is no role"),
        ({"rank": dr.Ratio}, r"Ratio'> is no rank policy: give Ratio\(0\.25\)"),
        ({"include": [3]}, r"3 is no pattern of names: give a text such as 'blocks\.\*'"),
        ({"exclude": 3}, "3 is no pattern of names"),
        ({"overrides": {3: dr.Override(dense=True)}}, "3 is no pattern of names"),
        ({"share_inputs": "yes"}, "share_inputs is 'yes': give True or False"),
        ({"allow_unprofitable": 2}, "allow_unprofitable is 2: give True or False"),
    ],
)
def test_a_value_that_cannot_be_is_refused_when_it_is_given(choice: dict, sentence: str) -> None:
    with pytest.raises(dr.PlanError, match=sentence):
        dr.PlanOptions(**choice)


def test_what_is_no_option_is_refused_in_words() -> None:
    with pytest.raises(TypeError, match="there is no option 'rnak' of planning"):
        dr.transform(model(), X, rnak=dr.Fixed(2))
    with pytest.raises(dr.PlanError, match=r"Fixed\(rank=3\) is no PlanOptions: give one, or a rank policy as rank="):
        dr.transform(model(), X, dr.Fixed(3))
