"""A plan that was given, fitted to the model at hand: kept as it is, or refused in words."""

from __future__ import annotations

from typing import Any

import pytest
from planning import Several, X, edited, names, reasons, several
from torch import nn

import dynrank_fx as dr
from dynrank_fx.plan import fit_plan


def test_a_given_plan_keeps_its_choice_and_what_it_does_not_list_stays_dense():
    def drop(data: dict[str, Any]) -> None:
        del data["sites"][1]
        data["sites"].reverse()

    plan = dr.Plan.from_json(edited(drop))
    fitted = dr.plan_of(dr.transform(Several(), X, plan=plan))
    assert names(fitted) == ["stem.weight", "head.weight", "last.weight"], "in the order of the model"
    assert reasons(fitted)["body.0.weight"] == "left dense by the given plan"
    assert fitted.total_flops == several().total_flops
    excluded = dr.plan_of(dr.transform(Several(), X, plan=several(exclude=["head"])))
    assert reasons(excluded)["head.weight"] == "excluded by name", "the reason is kept"


class Wider(Several):
    def __init__(self) -> None:
        super().__init__()
        self.head, self.last = nn.Linear(24, 22), nn.Linear(22, 3)


@pytest.mark.parametrize(
    ("model", "plan", "sentence"),
    [
        (
            lambda: nn.Linear(8, 8),
            lambda: several(),
            "factors stem.weight, which this model does not have: the plan is of another model",
        ),
        (
            Wider,
            lambda: several(),
            r"has head.weight as \(20, 24\) and the model as \(22, 24\): the plan is of another model",
        ),
        (
            Several,
            lambda: dr.Plan.from_json(edited(lambda d: d["sites"].append(d["sites"][0]))),
            "two rows for stem.weight; delete one",
        ),
        (
            Several,
            lambda: dr.Plan.from_json(edited(lambda d: d["sites"][0]["site"].update(name="deep.weight"))),
            "factors deep.weight, which this model keeps dense: depthwise convolution",
        ),
    ],
)
def test_a_plan_of_another_model_is_refused_in_words(model, plan, sentence):
    with pytest.raises(dr.PlanError, match=sentence):
        dr.transform(model(), plan=plan())


def test_costs_that_are_not_known_to_hold_are_left_out():
    class Strided(Several):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(8, 16, 3, padding=1, stride=2)

    fitted = fit_plan(dr.capture(Strided()), several())
    assert names(fitted) == names(several())
    assert (fitted.total_flops, fitted.low_flops) == (None, None)
    assert fit_plan(dr.capture(Strided()), several(), X).low_flops < several().low_flops
