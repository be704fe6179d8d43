"""What is known of a weight, as names and numbers: counted, matched by name, written and read."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from models import CASES
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import dynrank_fx as dr
from dynrank_fx.ops import LinearOp
from dynrank_fx.plan import find_sites, fits
from dynrank_fx.plan.site import Site, Skipped, Use, matches

SITE = Site("blocks.0.fc.weight", (3, 4), (Use(LinearOp(), (2, 4)), Use(LinearOp(), (5, 7, 4))), ("head.weight",))


def test_a_site_costs_its_parameters_once_and_the_flops_of_every_use():
    layer = nn.Linear(4, 3, bias=False)
    with FlopCounterMode(display=False) as counter:
        layer(torch.zeros(2, 4)), layer(torch.zeros(5, 7, 4))
    assert SITE.flops == counter.get_total_flops()
    assert SITE.params == layer.weight.numel()
    assert SITE.kind == "linear"


def test_flops_are_known_only_where_the_input_of_every_use_is():
    unknown = dataclasses.replace(SITE, uses=(*SITE.uses, Use(LinearOp())))
    assert unknown.flops is None
    assert unknown.params == SITE.params


def test_a_site_left_dense_keeps_its_names_and_shape_and_says_why():
    skipped = SITE.left_dense("excluded by name")
    assert skipped == Skipped(SITE.name, SITE.shape, "excluded by name", SITE.aliases)
    assert skipped.params == SITE.params


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_sites_of_every_operation_are_written_and_read_as_json(case):
    torch.manual_seed(0)
    sites, skipped = find_sites(dr.capture(case.model(), how=dr.Capture.SYMBOLIC))
    assert [site.name for site in sites] == list(case.sites)
    for row in (*sites, *skipped, SITE, dataclasses.replace(SITE, reads=2)):
        again = type(row).from_json(json.loads(json.dumps(row.to_json())))
        assert again == row
        assert hash(again) == hash(row)


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"name": 3}, TypeError, "3 is no text"),
        ({"aliases": [None]}, TypeError, "None is no text"),
        ({"shape": [3, 4.5]}, TypeError, "float"),
        ({"reads": "often"}, TypeError, "str"),
        ({"uses": None}, TypeError, "NoneType"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused(change, error, sentence):
    data = json.loads(json.dumps(SITE.to_json())) | change
    with pytest.raises(error, match=sentence):
        Site.from_json(data)
    data.pop("shape")
    with pytest.raises((KeyError, TypeError)):
        Site.from_json(data)


@pytest.mark.parametrize(
    ("pattern", "fitting"),
    [
        ("blocks.0.fc.weight", True),
        ("blocks.0.fc", True),
        ("blocks.*", True),
        ("blocks.?.fc", True),
        ("blocks.[1-9].fc", False),
        ("Blocks.*", False),
        ("blocks.0", False),
        ("fc", False),
        ("*.bias", False),
        ("", False),
    ],
)
def test_a_pattern_fits_the_name_of_a_weight_or_of_its_module_whole_and_in_its_case(pattern, fitting):
    assert fits("blocks.0.fc.weight", pattern) == fitting
    assert matches(SITE, [pattern]) == fitting
    assert matches(SITE.left_dense("small"), ["nothing", pattern]) == fitting


def test_an_alias_is_a_name_too():
    assert matches(SITE, ["head"])
    assert not matches(SITE, [])
    assert fits("table", "table"), "a bare parameter has the name of no module"
