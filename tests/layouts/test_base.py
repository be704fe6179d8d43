"""What every layout does, against the op on the joined weight, torch's counter of FLOPs and autograd."""

from __future__ import annotations

import math

import pytest
import torch
from layout_cases import apply, by_layout, layouts
from op_cases import OpCase, float64
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dynrank_fx.layouts import LAYOUTS, CPLayout, Factors, Layout, TuckerLayout
from dynrank_fx.layouts.base import shapes_of
from dynrank_fx.ops import ConvolutionOp, EinsumOp, LinearOp, MatmulOp

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")


def ranks(layout: Layout, case: OpCase) -> list[int]:
    limit = layout.max_rank(case.weight)
    return sorted({1, min(2, limit), limit})


def some_factors(layout: Layout, case: OpCase, rank: int) -> Factors:
    """Of no special form, as they are after training."""
    return tuple(float64(shape) for shape in layout.factor_shapes(case.weight, rank))


@by_layout
def test_the_stages_compute_the_op_on_the_joined_weight(layout: Layout, case: OpCase) -> None:
    for rank in ranks(layout, case):
        factors, x = some_factors(layout, case, rank), case.inputs()
        expected = case.op(x, layout.join(factors), at=case.index)
        torch.testing.assert_close(apply(layout, case, rank, x, factors), expected)


def takes_a_bias(layout: Layout, case: OpCase) -> bool:
    """Convolutions and linears do; addmm takes matrices only."""
    return isinstance(case.op, ConvolutionOp | LinearOp) or (isinstance(case.op, MatmulOp) and len(case.x) == 2)


@layouts(takes_a_bias)
def test_the_bias_is_added_once(layout: Layout, case: OpCase) -> None:
    factors, x = some_factors(layout, case, 1), case.inputs()
    channels = 1 - len(case.weight) if isinstance(case.op, ConvolutionOp) else -1
    bias = float64((case.op.output_shape(case.x, case.weight)[channels],))
    expected = case.op(x, layout.join(factors), bias)
    torch.testing.assert_close(apply(layout, case, 1, x, factors, bias), expected)


@by_layout
def test_a_cut_gives_a_factor_of_its_shape_for_each_name(layout: Layout, case: OpCase) -> None:
    factors = layout.split(float64(case.weight), 1)
    assert shapes_of(factors) == layout.factor_shapes(case.weight, 1)
    assert len(factors) == len(layout.factor_names)


@by_layout
def test_parameters_and_flops_are_what_the_factors_hold_and_torch_counts(layout: Layout, case: OpCase) -> None:
    for rank in ranks(layout, case):
        factors, x = some_factors(layout, case, rank), case.inputs()
        assert layout.params(case.weight, rank) == sum(factor.numel() for factor in factors)
        if isinstance(case.op, EinsumOp) and rank == 1:
            continue  # an einsum over an axis of size 1 is no product to the counter
        if getattr(case.op, "weight_first", False) and x.ndim == 1:
            x = x[:, None]  # and a product with a vector is none
        with FlopCounterMode(display=False) as counter:
            apply(layout, case, rank, x, factors)
        assert layout.flops(case.op, case.x, case.weight, rank) == counter.get_total_flops()


@by_layout
def test_the_flops_of_the_last_stage_are_what_is_left_where_another_site_applies_the_others(
    layout: Layout, case: OpCase
) -> None:
    rank = layout.max_rank(case.weight)
    shapes, x = layout.factor_shapes(case.weight, rank), case.x
    *first, _ = layout.stages(case.op, rank)
    others = 0
    for stage, index in first:
        others += stage.flops(x, shapes[index])
        x = stage.output_shape(x, shapes[index])
    last = layout.flops(case.op, case.x, case.weight, rank, last_only=True)
    assert last == layout.flops(case.op, case.x, case.weight, rank) - others


@layouts(lambda layout, case: not isinstance(layout, CPLayout))  # its einsum makes outer products too, which are few
def test_the_flops_of_a_join_are_what_torch_counts(layout: Layout, case: OpCase) -> None:
    einsum = isinstance(layout, TuckerLayout)
    for rank in [rank for rank in ranks(layout, case) if rank > 1 or not einsum]:
        factors = some_factors(layout, case, rank)
        with FlopCounterMode(display=False) as counter:
            layout.join(factors)
        assert layout.join_flops(case.weight, rank) == counter.get_total_flops()


@by_layout
def test_a_number_of_the_weight_is_the_sum_of_so_many_products(layout: Layout, case: OpCase) -> None:
    for rank in ranks(layout, case):
        ones = tuple(torch.ones_like(factor) for factor in some_factors(layout, case, rank))
        assert torch.equal(layout.join(ones).unique(), torch.tensor([layout.terms(case.weight, rank)]).double())


@by_layout
def test_the_weight_is_linear_in_each_factor(layout: Layout, case: OpCase) -> None:
    one, other = some_factors(layout, case, 1), some_factors(layout, case, 1)
    for i in range(len(one)):
        changed = (*one[:i], 2 * one[i] - other[i], *one[i + 1 :])
        expected = 2 * layout.join(one) - layout.join((*one[:i], other[i], *one[i + 1 :]))
        torch.testing.assert_close(layout.join(changed), expected)


@by_layout
def test_the_inner_product_is_that_of_the_weights(layout: Layout, case: OpCase) -> None:
    one, other = some_factors(layout, case, 1), some_factors(layout, case, 1)
    expected = torch.dot(layout.join(one).flatten(), layout.join(other).flatten())
    torch.testing.assert_close(layout.inner(one, other), expected)


@by_layout
def test_a_gradient_at_the_weight_is_pulled_back_as_autograd_does(layout: Layout, case: OpCase) -> None:
    rank = min(2, layout.max_rank(case.weight))
    G, factors = float64(case.weight), tuple(each.requires_grad_() for each in some_factors(layout, case, rank))
    expected = torch.autograd.grad((layout.join(factors) * G).sum(), factors)
    got = layout.pulled_back(factors, G)
    assert shapes_of(got) == shapes_of(factors)
    for mine, wanted in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, wanted)


@by_layout
def test_the_matrix_view_and_its_inverse_move_numbers_and_change_none(layout: Layout, case: OpCase) -> None:
    W = float64(case.weight)
    matrix = layout.to_matrix(W)
    assert matrix.shape == (case.matrices, *layout.matrix_shape(case.weight))
    assert torch.equal(matrix.flatten().sort().values, W.flatten().sort().values)
    assert torch.equal(layout.from_matrix(matrix, case.weight), W)


@layouts(lambda layout, case: layout.exact)
def test_full_rank_reproduces_the_weight_where_the_layout_is_exact(layout: Layout, case: OpCase) -> None:
    W = float64(case.weight)
    torch.testing.assert_close(layout.join(layout.split(W, layout.max_rank(case.weight))), W)


def test_only_cp_is_not_exact() -> None:
    assert [layout for layout in LAYOUTS if not layout.exact] == [CPLayout]


def error(W: Tensor, kept: Tensor) -> float:
    return float(torch.linalg.vector_norm(W - kept))


@by_layout
def test_what_is_followed_is_what_a_cut_keeps_and_stays_so_while_the_weight_moves(layout: Layout, case: OpCase) -> None:
    rank = math.ceil(layout.max_rank(case.weight) / 2)
    W = float64(case.weight)
    kept, told = layout.followed(W, rank)
    assert error(W, kept) <= 1.01 * error(W, layout.join(layout.split(W, rank))) + 1e-9
    again, _ = layout.followed(W, rank, told)
    assert error(W, again) <= 1.01 * error(W, kept) + 1e-9
    for _ in range(4):
        W = W + 0.01 * float64(case.weight)
        kept, told = layout.followed(W, rank, told)
    assert error(W, kept) <= 1.05 * error(W, layout.join(layout.split(W, rank))) + 1e-9


@layouts(lambda layout, case: layout.max_rank(case.weight) > 1)
def test_what_was_told_of_another_rank_is_not_used(layout: Layout, case: OpCase) -> None:
    W, limit = float64(case.weight), layout.max_rank(case.weight)
    told = layout.followed(W, 1)[1]
    assert torch.equal(layout.followed(W, limit, told)[0], layout.followed(W, limit)[0])


@layouts(lambda layout, case: isinstance(case.op, ConvolutionOp))
def test_a_cut_can_keep_the_outputs_only_where_the_last_factor_has_no_kernel(layout: Layout, case: OpCase) -> None:
    _, index = layout.stages(case.op, 1)[-1]
    kernel = layout.factor_shapes((1, 1, *[3] * len(case.weight[2:])), 1)[index][2:]
    assert not layout.last_holds_outputs(case.op) or math.prod(kernel) == 1


def test_a_layout_must_say_what_it_does() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Layout()  # type: ignore[abstract]
