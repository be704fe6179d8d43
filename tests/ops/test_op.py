"""What every op does: it applies, says the shape of what it gives, and counts, all by a frozen value."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from op_cases import OP_CASES, OpCase, float64
from torch import fx
from torch.utils.flop_counter import FlopCounterMode

from dynrank_fx.ops import Op

by_case = pytest.mark.parametrize("case", OP_CASES.values(), ids=OP_CASES)
BATCHED = {name: case for name, case in OP_CASES.items() if len(case.x) > 2}
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")


@by_case
def test_shape_and_flops_are_what_torch_gives_and_counts(case: OpCase) -> None:
    x, W = case.inputs(), float64(case.weight)
    assert case.op.output_shape(case.x, case.weight) == tuple(case.op(x, W, at=case.index).shape)
    if getattr(case.op, "weight_first", False) and x.ndim == 1:
        x = x[:, None]  # torch counts products with a matrix only
    with FlopCounterMode(display=False) as counter:
        case.op(x, W, at=case.index)
    assert case.op.flops(case.x, case.weight) == counter.get_total_flops()


@pytest.mark.parametrize("case", BATCHED.values(), ids=BATCHED)
def test_an_empty_batch_has_its_shape_and_costs_nothing(case: OpCase) -> None:
    x = case.inputs()[:0]
    at = None if case.at is None else case.index[:0]
    out = case.op(x, float64(case.weight), at=at)
    assert case.op.output_shape(tuple(x.shape), case.weight) == tuple(out.shape)
    assert case.op.flops(tuple(x.shape), case.weight) == 0


@by_case
def test_it_is_linear_in_its_weight(case: OpCase) -> None:
    """Why one op can apply each of several factors."""
    x, at = case.inputs(), case.index
    one, other = float64(case.weight), float64(case.weight)
    apart = case.op(x, one, at=at) - 2 * case.op(x, other, at=at)
    torch.testing.assert_close(case.op(x, one - 2 * other, at=at), apart)


@by_case
def test_applied_to_proxies_it_writes_a_graph_that_computes_the_same(case: OpCase) -> None:
    x, W, at = case.inputs(), float64(case.weight), case.index
    traced = fx.symbolic_trace(lambda x, W, at: case.op(x, W, None, at))
    assert torch.equal(traced(x, W, at), case.op(x, W, at=at))


@by_case
def test_it_is_a_frozen_value_that_equals_its_copy_and_nothing_else(case: OpCase) -> None:
    copy = dataclasses.replace(case.op)
    assert copy == case.op
    assert hash(copy) == hash(case.op)
    for other in OP_CASES.values():
        assert (other.op == case.op) == (repr(other.op) == repr(case.op))
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(case.op, dataclasses.fields(case.op)[0].name, None)


def test_an_op_must_say_all_four_things() -> None:
    with pytest.raises(TypeError, match=r"abstract methods .*__call__.*flops.*kind.*output_shape"):
        Op()  # type: ignore[abstract]
