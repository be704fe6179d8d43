"""The part of a weight that an op uses, against torch's own indexing, and what it is on two factors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from op_cases import float64
from torch import Tensor

from dynrank_fx.ops import WHOLE, View

AT = torch.tensor([2, 0, 0, 1])
VIEWS: dict[str, tuple[View, tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "whole": (WHOLE, (5, 7), lambda w: w),
    "rows": (View(rows=(1, 4)), (5, 7), lambda w: w[1:4]),
    "one column": (View(columns=(6, 7)), (5, 7), lambda w: w[:, 6:]),
    "transposed": (View(transposed=True), (5, 7), lambda w: w.T),
    "a transposed block": (View((0, 2), (3, 7), transposed=True), (5, 7), lambda w: w[:2, 3:].T),
    "rows of a stack": (View(rows=(1, 4)), (3, 5, 7), lambda w: w[:, 1:4]),
    "one of a stack": (View(index=2), (3, 5, 7), lambda w: w[2]),
    "a transposed block of one of a stack": (View((1, 5), (0, 3), True, 1), (3, 5, 7), lambda w: w[1, 1:5, :3].T),
    "gathered": (View(gathered=True), (3, 5, 7), lambda w: w[AT]),
    "transposed rows of gathered ones": (
        View(rows=(2, 3), transposed=True, gathered=True),
        (3, 5, 7),
        lambda w: w[AT][:, 2:3].mT,
    ),
    "cast": (View(columns=(1, 3), dtype="float32"), (5, 7), lambda w: w[:, 1:3].float()),
}
by_view = pytest.mark.parametrize(("view", "shape", "taken"), VIEWS.values(), ids=VIEWS)


@by_view
def test_it_takes_what_torchs_indexing_takes(view, shape, taken):
    W = float64(shape)
    got, expected = view(W, AT), taken(W)
    assert got.dtype == expected.dtype
    assert torch.equal(got, expected)


@by_view
def test_its_shape_is_that_of_what_it_takes_but_for_how_many_are_gathered(view, shape, taken):
    expected = tuple(taken(float64(shape)).shape)
    assert view.shape(shape) == ((shape[0], *expected[1:]) if view.gathered else expected)


@by_view
def test_the_parts_of_both_factors_make_the_part_of_their_product(view, shape, taken):
    left, right = float64((*shape[:-1], 2)), float64((*shape[:-2], 2, shape[-1]))
    parts = view.of_left()(left, AT), view.of_right()(right, AT)
    product = parts[1] @ parts[0] if view.transposed else parts[0] @ parts[1]
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if view.dtype else {}
    torch.testing.assert_close(product, taken(left @ right), **tolerance)


@by_view
def test_it_is_differentiable_and_what_it_leaves_out_gets_no_gradient(view, shape, taken):
    W = float64(shape).requires_grad_()
    (got,) = torch.autograd.grad(view(W, AT).square().sum(), W)
    (expected,) = torch.autograd.grad(taken(W).square().sum(), W)
    assert torch.equal(got, expected)
