"""Layouts of two factors: the cut of Eckart and Young per group, and moments through the product of the factors."""

from __future__ import annotations

import math

import pytest
import torch
from layout_cases import by_two_factors, layouts
from op_cases import OpCase, float64
from torch import Tensor

from dynrank_fx.layouts import TwoFactors


@by_two_factors
def test_the_error_is_that_of_the_discarded_singular_values_of_its_matrix(layout: TwoFactors, case: OpCase) -> None:
    W = float64(case.weight)
    s = torch.linalg.svdvals(layout.to_matrix(W))
    assert s.shape == (case.matrices, layout.max_rank(case.weight))
    for rank in range(1, s.shape[-1] + 1):
        error = torch.linalg.vector_norm(layout.join(layout.split(W, rank)) - W)
        torch.testing.assert_close(error, torch.linalg.vector_norm(s[:, rank:]), rtol=1e-9, atol=1e-12)


@by_two_factors
def test_factors_and_their_matrices_are_two_views_of_the_same_numbers(layout: TwoFactors, case: OpCase) -> None:
    rows, columns = layout.matrix_shape(case.weight)
    B, A = float64((case.matrices, rows, 3)), float64((case.matrices, 3, columns))
    factors = layout.from_matrices((B, A), case.weight)
    assert tuple(tuple(factor.shape) for factor in factors) == layout.factor_shapes(case.weight, 3)
    assert layout.weight_shape(*layout.factor_shapes(case.weight, 3)) == case.weight
    for got, expected in zip(layout.to_matrices(factors), (B, A), strict=True):
        assert torch.equal(got, expected)
    torch.testing.assert_close(layout.join(factors), layout.from_matrix(B @ A, case.weight))


@by_two_factors
def test_both_factors_bear_the_same_part_of_every_direction(layout: TwoFactors, case: OpCase) -> None:
    """BᵀB = A Aᵀ, with the singular values on the diagonal."""
    W, rank = float64(case.weight), layout.max_rank(case.weight)
    B, A = layout.to_matrices(layout.split(W, rank))
    expected = torch.diag_embed(torch.linalg.svdvals(layout.to_matrix(W)))
    torch.testing.assert_close(B.mT @ B, expected)
    torch.testing.assert_close(A @ A.mT, expected)


@by_two_factors
def test_what_tells_what_is_kept_is_an_orthonormal_basis_of_the_shorter_side(layout: TwoFactors, case: OpCase) -> None:
    W, rank = float64(case.weight), layout.max_rank(case.weight)
    kept, (V,) = layout.followed(W, rank)
    assert V.shape == (case.matrices, min(layout.matrix_shape(case.weight)), rank)
    torch.testing.assert_close(V.mT @ V, torch.eye(rank, dtype=torch.float64).expand(case.matrices, -1, -1))
    torch.testing.assert_close(kept, W)


def jacobian(layout: TwoFactors, factors: tuple[Tensor, ...]) -> Tensor:
    """[numbers of W, numbers of both factors], by autograd."""
    rows = torch.autograd.functional.jacobian(lambda *each: layout.join(each).flatten(), factors)
    return torch.cat([row.flatten(1) for row in rows], dim=1)


@pytest.mark.parametrize("rank", [1, 2])
@by_two_factors
def test_first_moments_that_a_gradient_explains_are_explained_by_the_moment_of_the_weight(
    layout: TwoFactors, case: OpCase, rank: int
) -> None:
    factors = tuple(float64(shape) for shape in layout.factor_shapes(case.weight, rank))
    G = float64(case.weight)
    moments = tuple(torch.autograd.functional.vjp(lambda *each: layout.join(each), factors, G)[1])
    M = layout.first_moment(factors, moments)
    again = torch.autograd.functional.vjp(lambda *each: layout.join(each), factors, M)[1]
    for got, expected in zip(again, moments, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-8)
    assert M.norm() <= G.norm() * (1 + 1e-9), "the part of it that the factors see"


@layouts(lambda layout, case: isinstance(layout, TwoFactors) and math.prod(case.weight) <= 200)
def test_first_moments_of_any_kind_give_the_least_norm_least_squares_solution(layout: TwoFactors, case: OpCase) -> None:
    """min Σ ‖J_iᵀ M − M_i‖², and of those the least ‖M‖, by torch.linalg.lstsq."""
    factors = tuple(float64(shape) for shape in layout.factor_shapes(case.weight, 1))
    moments = tuple(torch.randn_like(factor) for factor in factors)
    target = torch.cat([moment.flatten() for moment in moments])[:, None]
    system = jacobian(layout, factors).T
    expected = torch.linalg.lstsq(system, target, rcond=1e-10, driver="gelsd").solution.reshape(case.weight)
    torch.testing.assert_close(layout.first_moment(factors, moments), expected, rtol=1e-6, atol=1e-8)


@by_two_factors
def test_a_second_moment_of_rank_one_is_recovered_exactly(layout: TwoFactors, case: OpCase) -> None:
    factors = tuple(float64(shape) for shape in layout.factor_shapes(case.weight, 2))
    V = layout.join(tuple(float64(shape).abs() + 0.1 for shape in layout.factor_shapes(case.weight, 1)))
    squares = tuple(factor.square() for factor in factors)
    moments = tuple(torch.autograd.functional.vjp(lambda *each: layout.join(each), squares, V)[1])
    torch.testing.assert_close(layout.second_moment(factors, moments), V, rtol=1e-10, atol=0)
