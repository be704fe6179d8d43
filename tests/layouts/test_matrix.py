"""Layouts of what multiplies by a matrix: which factor comes first, which part of it, and the matrix of an einsum."""

from __future__ import annotations

import math

import pytest
import torch
from op_cases import EMBEDDINGS, PRODUCTS, TURNED, OpCase, float64

from dynrank_fx.layouts import EinsumLayout, LinearLayout, layout_for
from dynrank_fx.ops import ConvOp, EinsumOp, EmbeddingOp, LinearOp, MatmulOp, ProductOp, View

MATRICES = {name: case for name, case in (PRODUCTS | EMBEDDINGS).items() if isinstance(case.op, ProductOp)}
EINSUMS = {name: case for name, case in PRODUCTS.items() if isinstance(case.op, EinsumOp)}


@pytest.mark.parametrize(
    ("op", "order"),
    [
        (LinearOp(), (1, 0)),
        (LinearOp(View(transposed=True)), (0, 1)),
        (MatmulOp(), (0, 1)),
        (MatmulOp(View(transposed=True)), (1, 0)),
        (MatmulOp(weight_first=True), (1, 0)),
        (MatmulOp(View(transposed=True), weight_first=True), (0, 1)),
        (EmbeddingOp(), (0, 1)),
        (EmbeddingOp(View(transposed=True)), (1, 0)),
    ],
    ids=str,
)
def test_the_factor_with_the_contracted_axis_comes_first(op: ProductOp, order: tuple[int, int]) -> None:
    """W = L R: x Wᵀ = (x Rᵀ) Lᵀ and x W = (x L) R."""
    assert tuple(index for _, index in LinearLayout().stages(op, 2)) == order


@pytest.mark.parametrize("op", [LinearOp(TURNED), MatmulOp(TURNED), EmbeddingOp(TURNED)], ids=str)
def test_each_factor_gives_its_own_part_of_a_part(op: ProductOp) -> None:
    views = {index: stage.view for stage, index in LinearLayout().stages(op, 2)}  # type: ignore[attr-defined]
    assert views == {0: View(rows=(2, 8), transposed=True), 1: View(columns=(1, 6), transposed=True)}


def test_scales_and_the_row_that_is_padding_are_applied_once() -> None:
    first, last = (op for op, _ in LinearLayout().stages(MatmulOp(beta=2, alpha=3), 2))
    assert (first, last) == (MatmulOp(), MatmulOp(beta=2, alpha=3))
    first, last = (op for op, _ in LinearLayout().stages(EmbeddingOp(padding_idx=4), 2))
    assert (first, last) == (EmbeddingOp(padding_idx=4), MatmulOp())


@pytest.mark.parametrize("case", MATRICES.values(), ids=MATRICES)
def test_a_stack_is_cut_matrix_by_matrix(case: OpCase) -> None:
    W, layout = float64(case.weight), LinearLayout()
    left, right = layout.split(W, 1)
    torch.testing.assert_close(layout.join((left, right)), left @ right)
    for matrix, kept in zip(
        W.flatten(0, -3) if W.ndim > 2 else [W], (left @ right).reshape(-1, *W.shape[-2:]), strict=True
    ):
        least = torch.linalg.svdvals(matrix)[1:].norm()
        torch.testing.assert_close(torch.linalg.matrix_norm(matrix - kept), least)


def test_every_product_is_served_and_nothing_else() -> None:
    assert all(LinearLayout().serves(case.op) for case in MATRICES.values())
    assert all(LinearLayout.for_op(case.op) == LinearLayout() for case in MATRICES.values())
    assert not LinearLayout().serves(EinsumOp("bd", "de", "be"))
    assert not LinearLayout().serves(ConvOp((1,), (0,), (1,)))


@pytest.mark.parametrize("case", EINSUMS.values(), ids=EINSUMS)
def test_the_matrix_of_an_einsum_is_contracted_by_free_axes_for_each_shared_index(case: OpCase) -> None:
    op, W = case.op, float64(case.weight)
    assert isinstance(op, EinsumOp)
    layout = EinsumLayout.for_op(op)
    shared, contracted, free = ("".join(op.weight[i] for i in axes) for axes in op.axes)
    expected = torch.einsum(f"{op.weight}->{shared}{contracted}{free}", W)
    sizes = [math.prod(W.shape[i] for i in axes) for axes in op.axes]
    assert torch.equal(layout.to_matrix(W), expected.reshape(sizes))
    assert layout.matrix_shape(case.weight) == (sizes[1], sizes[2])


@pytest.mark.parametrize("case", EINSUMS.values(), ids=EINSUMS)
def test_the_factors_of_an_einsum_are_named_axes_with_one_more_between(case: OpCase) -> None:
    op, W = case.op, float64(case.weight)
    assert isinstance(op, EinsumOp)
    layout = EinsumLayout.for_op(op)
    rank = layout.max_rank(case.weight)
    left, right = layout.split(W, rank)
    shared, contracted, free = ("".join(op.weight[i] for i in axes) for axes in op.axes)
    joined = torch.einsum(f"{shared}{contracted}R,{shared}R{free}->{op.weight}", left, right)
    torch.testing.assert_close(joined, W)
    assert layout.last_holds_outputs(op)


def test_one_weight_serves_an_einsum_and_its_transpose_and_none_of_another_kind() -> None:
    there, back = EinsumOp("bd", "de", "be"), EinsumOp("be", "de", "bd")
    layout = layout_for(there)
    assert layout.serves(there)
    assert layout.serves(back)
    x, factors = float64((3, 4)), tuple(float64(shape) for shape in layout.factor_shapes((5, 4), 2))
    (first, i), (last, j) = layout.stages(back, 2)
    torch.testing.assert_close(last(first(x, factors[i]), factors[j]), back(x, layout.join(factors)))
    assert not layout.serves(EinsumOp("bhd", "dh", "bd"))
    assert not layout.serves(LinearOp())


def test_the_letter_of_the_rank_is_one_that_no_operand_has() -> None:
    op = EinsumOp("abc", "cd", "abd")
    (first, _), (last, _) = EinsumLayout.for_op(op).stages(op, 2)
    assert isinstance(first, EinsumOp)
    assert isinstance(last, EinsumOp)
    (r,) = set(first.out) - set(op.x)
    assert r not in op.x + op.weight + op.out
    assert (first.x, last.out) == (op.x, op.out)
