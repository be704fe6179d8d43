"""Plans: decided on data, printable, comparable, editable JSON; their totals are what is really counted."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from models import CASES, SharedLinears, Tied
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import dynrank_fx as dr
from dynrank_fx.layouts import CONV_LAYOUTS
from dynrank_fx.plan import break_even_rank, find_sites, fit_plan


class Several(nn.Module):
    """Two convolutions, a depthwise one, a classifier, and a matrix too small to factor."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.deep = nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.body = nn.Sequential(nn.Conv2d(16, 24, 3, stride=2), nn.ReLU())
        self.head, self.last = nn.Linear(24, 20), nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(torch.relu(self.deep(torch.relu(self.stem(x)))))
        return self.last(torch.tanh(self.head(x.mean((2, 3)))))


X = (torch.zeros(2, 8, 9, 8),)


def several(**options: Any) -> dr.Plan:
    torch.manual_seed(0)
    options = {"rank": dr.Ratio(0.25)} | options
    return dr.make_plan(dr.capture(Several(), X), example_inputs=X, **options)


def names(plan: dr.Plan) -> list[str]:
    return [row.site.name for row in plan.sites]


def reasons(plan: dr.Plan) -> dict[str, str]:
    return {skipped.name: skipped.reason for skipped in plan.skipped}


# Choosing


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
        (
            {"conv_layout": "spatial"},
            "'spatial' is no layout of convolutions: give one of ChannelLayout, SpatialLayout",
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


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("layout", [dr.ChannelLayout, dr.SpatialLayout], ids=lambda layout: layout.name)
def test_break_even_is_the_largest_rank_that_costs_less(case, layout):
    torch.manual_seed(0)
    x = (case.inputs(),)
    net = dr.capture(case.model(), x)
    plan = dr.make_plan(net, dr.Ratio(1.0), x, conv_layout=layout, allow_unprofitable=True)
    for row in plan.sites:
        every = [dataclasses.replace(row, rank=r) for r in range(1, row.layout.max_rank(row.site.shape) + 1)]
        by_params = max((r.rank for r in every if r.params < row.site.params), default=0)
        by_flops = max((r.rank for r in every if r.flops < row.site.flops), default=0)
        assert break_even_rank(row.site, row.layout) == (by_params, by_flops)
        unmeasured = dataclasses.replace(row.site, uses=tuple(dr_use(use) for use in row.site.uses))
        assert break_even_rank(unmeasured, row.layout) == (by_params, None)


def dr_use(use: Any) -> Any:
    return dataclasses.replace(use, input_shape=None)


# Totals


def flops(model: nn.Module, x: Tensor) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops()


def test_attention_is_counted_though_its_fast_path_would_hide_it():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    plan = dr.make_plan(dr.capture(model, (x,)), dr.Ratio(0.25), (x,))
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        # torch's counter does not know the fused attention of the CPU: its two products, batch 2 · (5·5·16) each.
        products = 2 * 2 * (2 * 5 * 5 * 16)
        with sdpa_kernel(SDPBackend.MATH):
            assert plan.total_flops == flops(model, x) == 40960 + products
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


TABLE = """\
weight         shape      layout   rank  params          MFLOPs              why dense
-------------  ---------  -------  ----  --------------  ------------------  -------------------------------------
stem.weight    16x8x3x3   channel     4  1,152 -> 352    0.3318 -> 0.1014
body.0.weight  24x16x3x3  channel     6  3,456 -> 1,008  0.1659 -> 0.04838
last.weight    3x20       linear      1  60 -> 23        0.00024 -> 9.2e-05
deep.weight    16x1x3x3   dense          144                                 depthwise convolution: rank 1 already
head.weight    20x24      dense          480                                 excluded by name

3 sites factored, 2 matrices left dense
captured    by symbolic tracing
parameters  5,371 -> 2,086 (38.8% of dense)
FLOPs       541,296 -> 193,244 (35.7% of dense) on the example inputs"""

SHARED_TABLE = """\
weight                        shape  layout  rank  params
----------------------------  -----  ------  ----  ---------  ------
first.weight = second.weight  10x10  linear     2  100 -> 40  2 uses

1 site factored, 0 matrices left dense
captured    by symbolic tracing
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


def edited(change: Callable[[dict[str, Any]], object]) -> str:
    data = json.loads(several().to_json())
    change(data)
    return json.dumps(data)


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
            "stem.weight .*: .*'linear' does not serve a conv2d",
        ),
        (
            edited(lambda d: d["sites"][2].update(layout="spatial")),
            "head.weight .*'spatial' does not serve a linear",
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


# A given plan


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


# Values


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


class OddWeights(nn.Module):
    """A complex and an integer matrix as linear weights, beside an ordinary one."""

    def __init__(self) -> None:
        super().__init__()
        self.wave = nn.Parameter(torch.randn(8, 8, dtype=torch.complex64))
        self.count = nn.Parameter(torch.ones(8, 8, dtype=torch.int64), requires_grad=False)
        self.real = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        wave = nn.functional.linear(x.to(torch.complex64), self.wave).abs()
        count = nn.functional.linear(x.to(torch.int64), self.count)
        return self.real(wave + count.to(x.dtype))


@pytest.mark.parametrize("how", [dr.Capture.SYMBOLIC, dr.Capture.EXPORT], ids=lambda how: how.name)
def test_complex_and_integer_matrices_stay_dense_with_their_dtype_as_the_reason(how):
    torch.manual_seed(0)
    x = torch.randn(3, 8)
    model = OddWeights()
    net = dr.transform(model, (x,), rank=dr.Fixed(2), how=how)
    assert reasons(dr.plan_of(net)) == {
        "wave": "its dtype is torch.complex64, which has no truncated form",
        "count": "its dtype is torch.int64, which has no truncated form",
    }
    assert torch.equal(net(x), model(x))


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
