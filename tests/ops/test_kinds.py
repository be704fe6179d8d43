"""Ops as JSON: every kind there and back, and no guess at anything else."""

from __future__ import annotations

import json
from dataclasses import fields

import pytest
from op_cases import CONVS, OP_CASES, TRANSPOSED, OpCase

from dynrank_fx.ops import LinearOp, Op, View, kinds, op_from_json, op_to_json


@pytest.mark.parametrize("case", OP_CASES.values(), ids=OP_CASES)
def test_an_op_survives_json(case: OpCase) -> None:
    text = json.dumps(op_to_json(case.op))
    op = op_from_json(json.loads(text))
    assert op == case.op
    assert op.kind == case.op.kind
    assert hash(op) == hash(case.op), "lists are tuples again"


def test_json_says_the_kind_and_every_setting_by_its_name() -> None:
    op = LinearOp(View(rows=(2, 5), dtype="float64"))
    whole = {"columns": None, "transposed": False, "index": None, "gathered": False}
    assert op_to_json(op) == {"kind": "linear", "view": {"rows": (2, 5), "dtype": "float64", **whole}}
    for case in (*CONVS.values(), *TRANSPOSED.values()):
        assert op_to_json(case.op).keys() == {"kind", *(each.name for each in fields(case.op))}


def test_what_is_left_out_is_as_by_default() -> None:
    assert op_from_json({"kind": "linear"}) == LinearOp()


def test_kinds_are_all_that_there_are_each_under_the_name_that_it_gives_itself() -> None:
    assert set(kinds.KINDS.values()) == {type(case.op) for case in OP_CASES.values()}
    assert all(kinds.KINDS[case.op.kind] is type(case.op) for case in OP_CASES.values())
    assert {case.op.kind for case in OP_CASES.values()} == set(kinds.KINDS)
    assert all(issubclass(kind, Op) for kind in kinds.KINDS.values())


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        ({"kind": "bilinear"}, KeyError, "bilinear"),
        ({}, KeyError, "kind"),
        ({"kind": "linear", "bias": 3}, TypeError, "bias"),
        ({"kind": "linear", "view": {"row": [0, 1]}}, TypeError, "row"),
        ({"kind": "conv2d", "stride": [1, 1]}, TypeError, "'padding' and 'dilation'"),
    ],
    ids=str,
)
def test_anything_else_is_refused_by_its_name(data, error, words) -> None:
    with pytest.raises(error, match=words):
        op_from_json(data)
