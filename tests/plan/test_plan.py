"""Plans: decided on data, printable, comparable, editable JSON; their totals are what is really counted."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from models import CASES, SharedLinears
from planning import Several, X, edited, names, several
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import dynrank_fx as dr
from dynrank_fx.layouts import CONV_LAYOUTS
from dynrank_fx.plan import fit_plan


def flops(model: nn.Module, x: Tensor) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops()


TABLE = """\
weight         shape      layout   rank  params          MFLOPs              why dense
-------------  ---------  -------  ----  --------------  ------------------  -------------------------------------
stem.weight    16x8x3x3   channel     4  1,152 -> 352    0.3318 -> 0.1014
body.0.weight  24x16x3x3  channel     6  3,456 -> 1,008  0.1659 -> 0.04838
last.weight    3x20       linear      1  60 -> 23        0.00024 -> 9.2e-05
deep.weight    16x1x3x3   dense          144                                 depthwise convolution: rank 1 already
head.weight    20x24      dense          480                                 excluded by name

3 sites factored, 2 matrices left dense
captured    as one graph
parameters  5,371 -> 2,086 (38.8% of dense)
FLOPs       541,296 -> 193,244 (35.7% of dense) on the example inputs
narrower    a dense model 0.60 times as wide has as many: train it too, and compare"""

SHARED_TABLE = """\
weight                        shape  layout  rank  params     shared
----------------------------  -----  ------  ----  ---------  ------
first.weight = second.weight  10x10  linear     2  100 -> 40  2 uses

1 site factored, 0 matrices left dense
captured    as one graph
parameters  120 -> 60 (50.0% of dense)"""


def test_the_table_says_kept_skipped_why_and_the_totals():
    assert str(several(exclude=["head"])) == TABLE
    assert str(dr.make_plan(dr.capture(SharedLinears()), dr.Fixed(2))) == SHARED_TABLE


# JSON


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("measured", [True, False])
def test_a_plan_survives_json_and_fits_its_model_again(case, measured):
    torch.manual_seed(0)
    x = (case.inputs(),)
    net = dr.capture(case.model(), x)
    plan = dr.make_plan(net, dr.Ratio(0.5), x if measured else None, allow_unprofitable=True)
    again = dr.Plan.from_json(plan.to_json())
    assert again == plan
    assert hash(again) == hash(plan)
    assert again.to_json() == plan.to_json()
    assert str(again) == str(plan)
    assert (again.total_flops is not None) == measured
    assert fit_plan(net, again) == plan, "the costs of the example come along"
    assert fit_plan(net, again, x).low_flops == fit_plan(net, plan, x).low_flops is not None


def test_a_plan_is_frozen_and_any_difference_shows():
    plan = several()
    assert plan == several()
    assert plan != several(rank=dr.Ratio(0.2))
    assert plan != several(exclude=["head"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.sites = ()


def test_with_ranks_changes_the_named_ones_and_refuses_what_does_not_fit():
    plan = several()
    other = plan.with_ranks({"head.weight": 7})
    assert [row.rank for row in other.sites] == [4, 6, 7, 1]
    assert [row.rank for row in plan.sites] == [4, 6, 5, 1]
    with pytest.raises(dr.PlanError, match=r"the plan has no site 'deep.weight' to give a rank to"):
        plan.with_ranks({"deep.weight": 1})
    with pytest.raises(dr.PlanError, match=r"head.weight cannot have rank 21: give a whole number from 1 to 20"):
        plan.with_ranks({"head.weight": 21})


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "the plan is not JSON"),
        ("{", "the plan is not JSON"),
        ("[1, 2]", "this is not a plan"),
        ("{}", "this is not a plan"),
        (edited(lambda d: d.update(format="other")), "this is not a plan"),
        (edited(lambda d: d.update(version=2)), "version 2 and this dynrank-fx reads version 1; upgrade dynrank-fx"),
        (edited(lambda d: d.pop("version")), "version None"),
        (edited(lambda d: d.pop("sites")), "incomplete .*'sites'"),
        (edited(lambda d: d.update(sites=None)), "value of the wrong kind"),
        (edited(lambda d: d.update(total_params="many")), "value of the wrong kind"),
        (edited(lambda d: d.update(total_flops=1.5)), "value of the wrong kind"),
        (edited(lambda d: d["sites"][0].pop("rank")), "incomplete .*'rank'"),
        (edited(lambda d: d["sites"][0].update(rank=0)), "stem.weight cannot have rank 0: .* from 1 to 16"),
        (edited(lambda d: d["sites"][0].update(rank=17)), "stem.weight cannot have rank 17: .* from 1 to 16"),
        (edited(lambda d: d["sites"][0].update(rank=2.5)), "stem.weight cannot have rank 2.5"),
        (edited(lambda d: d["sites"][0].update(rank="4")), "stem.weight cannot have rank 4"),
        (edited(lambda d: d["sites"][0].update(rank=True)), "stem.weight cannot have rank True"),
        (
            edited(lambda d: d["sites"][0].update(layout="linear")),
            "stem.weight .*: .*'linear' does not serve conv2d",
        ),
        (
            edited(lambda d: d["sites"][2].update(layout="spatial")),
            "head.weight .*'spatial' does not serve linear",
        ),
        (
            edited(lambda d: d["sites"][0].update(layout="tensor train")),
            "no layout 'tensor train'; choose one of linear",
        ),
    ],
)
def test_an_edited_or_broken_plan_is_refused_in_words(text, sentence):
    with pytest.raises(dr.PlanError, match=sentence):
        dr.Plan.from_json(text)


def leaves(data: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of the JSON."""
    for key in data if isinstance(data, dict) else range(len(data)):
        yield data, key
        if isinstance(data[key], dict | list):
            yield from leaves(data[key])


def test_whatever_is_put_in_place_of_a_value_is_refused_in_words_or_makes_a_plan():
    text, net = several().to_json(), dr.capture(Several(), X)
    accepted = refused = 0
    for position in range(sum(1 for _ in leaves(json.loads(text)))):
        for garbage in (None, 0, 2.5, "x", [], [0], "delete"):
            data = json.loads(text)
            container, key = list(leaves(data))[position]
            if garbage == "delete":
                del container[key]
            else:
                container[key] = garbage
            try:
                plan = dr.Plan.from_json(json.dumps(data))
                assert dr.Plan.from_json(plan.to_json()) == plan
                assert str(plan)
                fit_plan(net, plan)
                accepted += 1
            except dr.PlanError:
                refused += 1
    assert accepted > 0
    assert refused > accepted


def test_costs_in_the_file_are_for_reading_and_are_counted_anew():
    plan = dr.Plan.from_json(edited(lambda d: d["sites"][0].update(rank=8, params=[0, 0], flops=None)))
    assert plan == several().with_ranks({"stem.weight": 8})


class Auxiliary(Several):
    """A head that only training uses."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(16, 20)

    def forward(self, x: Tensor) -> Any:
        h = torch.relu(self.stem(x)).mean((2, 3))
        return (h, self.extra(h)) if self.training else h


@pytest.mark.parametrize("how", [dr.Capture.SYMBOLIC, dr.Capture.EXPORT], ids=lambda how: how.name)
def test_a_head_that_only_training_uses_is_a_site_that_costs_nothing_in_evaluation(how):
    torch.manual_seed(0)
    model = Auxiliary()
    net = dr.transform(model, X, rank=dr.Fixed(3), how=how)
    plan = dr.plan_of(net)
    assert names(plan) == ["stem.weight", "extra.weight"]
    assert plan.total_flops == flops(model.eval(), X[0])
    dr.enter_(net, dr.Phase.LOW)
    assert plan.low_flops == flops(dr.truncate(net), X[0])
    assert torch.equal(net.train()(X[0])[1], net.extra(net.stem(X[0]).relu().mean((2, 3))))


def test_a_frozen_weight_stays_frozen_in_every_phase():
    torch.manual_seed(0)
    model = Several()
    model.head.weight.requires_grad_(False)
    net = dr.transform(model, X)
    assert "head.weight" in names(dr.plan_of(net))
    optimizer = torch.optim.AdamW(p for p in net.parameters() if p.requires_grad)
    for phase in (dr.Phase.LOW, dr.Phase.FULL, dr.Phase.LOW):
        dr.enter_(net, phase, optimizer)
        frozen = {name for name, p in net.named_parameters() if not p.requires_grad}
        assert frozen == ({"head.left", "head.right"} if phase is dr.Phase.LOW else {"head.weight"})
        net(*X).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("layout", CONV_LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize("stride", [1, 2])
def test_the_flops_of_every_layout_are_those_that_torch_counts(layout, stride):
    torch.manual_seed(0)
    model, x = nn.Conv2d(32, 64, 3, stride, padding=1), (torch.randn(2, 32, 9, 9),)
    net = dr.transform(nn.Sequential(model), x, rank=dr.Fixed(8), conv_layout=layout)
    dr.enter_(net, dr.Phase.LOW)
    plan = dr.plan_of(net)
    assert plan.sites[0].layout.name == layout.name
    assert (plan.total_flops, plan.low_flops) == (flops(model, x[0]), flops(dr.truncate(net), x[0]))


@pytest.mark.parametrize("layout", CONV_LAYOUTS, ids=lambda layout: layout.name)
def test_a_budget_of_flops_is_kept_as_torch_counts_them(layout):
    torch.manual_seed(0)
    model, x = nn.Sequential(*[nn.Conv2d(32, 32, 3, padding=1) for _ in range(3)]), (torch.randn(2, 32, 8, 8),)
    net = dr.transform(model, x, rank=dr.Budget(flops=0.2), conv_layout=layout)
    dr.enter_(net, dr.Phase.LOW)
    assert 0.17 < flops(dr.truncate(net), x[0]) / flops(model, x[0]) <= 0.2


def test_what_is_no_plan_and_what_was_not_captured_are_refused():
    net, example = dr.capture(torch.nn.Linear(8, 8), X), torch.nn.Linear(8, 8)
    for call in (lambda: dr.factorize(net, "plan.json"), lambda: dr.transform(example, X, plan="plan.json")):
        with pytest.raises(dr.PlanError, match=r"^'plan.json' is no Plan: give what make_plan makes"):
            call()
    with pytest.raises(dr.PlanError, match=r"^Linear was not captured: give what capture\(model, inputs\) makes of it"):
        dr.make_plan(example)
    assert vars(example).keys() == vars(torch.nn.Linear(8, 8)).keys(), "and it is as it was"


@pytest.mark.parametrize(
    ("capture", "said"),
    [
        ("by symbolic tracing", "as one graph"),
        ("by torch.export, as asked", "as one graph, by torch.export"),
        ("module by module (1 parts and 1 single layers): as asked", "module by module (1 parts and 1 single layers)"),
        (
            "by torch.export (off by rounding: 3e-07): a.b.Model.forward, line 3, has a loop",
            "as one graph, by torch.export (off by rounding: 3e-07) (`capture` of the plan says why not otherwise)",
        ),
    ],
)
def test_the_line_of_the_capture_names_no_classes(capture: str, said: str) -> None:
    plan = dr.Plan((), (), 10, capture=capture)
    assert f"captured    {said}\n" in str(plan)
    assert dr.Plan.from_json(plan.to_json()).capture == capture


@pytest.mark.parametrize(("wide", "rank"), [(256, 32), (512, 150)])
def test_the_narrower_dense_model_has_as_many_flops(wide, rank):
    def model(width: int) -> nn.Module:
        return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(3)))

    net = dr.transform(model(wide), (torch.randn(2, wide),), rank=dr.Fixed(rank))
    plan = dr.plan_of(net)
    width = round(wide * plan.narrower)
    narrow = flops(model(width), torch.randn(2, width))
    assert narrow == pytest.approx(plan.low_flops, rel=0.01)
    assert f"a dense model {plan.narrower:.2f} times as wide has as many" in str(plan)
    known = "; on text it was better at ranks 16 to 128"
    assert (known in str(plan)) == (rank == 32)


def test_nothing_factored_or_no_example_has_no_narrower_model():
    model = nn.Sequential(nn.Linear(8, 8))
    assert dr.plan_of(dr.transform(model, (torch.randn(2, 8),), exclude=["*"], allow_empty=True)).narrower is None
    traced = dr.capture(torch.fx.symbolic_trace(nn.Sequential(nn.Linear(8, 8))))
    assert dr.plan_of(dr.transform(traced)).narrower is None
