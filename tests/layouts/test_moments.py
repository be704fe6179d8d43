"""Moments through the product of factors, against autograd, least squares and enumeration."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dynrank_fx.layouts import CPLayout, TuckerLayout
from dynrank_fx.layouts import moments as algebra
from dynrank_fx.layouts.moments import moments_to_dense, second_moments_to_dense

SHAPE, RANK = (6, 5, 3, 2), 3
LAYOUTS = (TuckerLayout(), CPLayout())
by_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)


def product(factors: tuple[Tensor, ...]) -> Tensor:
    return factors[0] @ factors[1]


def inner(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> Tensor:
    return (product(one) * product(other)).sum()


def some_factors(layout, *, dead: bool = False) -> tuple[Tensor, ...]:
    """In float64, as they are after training: not balanced, nothing orthogonal; dead: one row or column is gone."""
    torch.manual_seed(0)
    factors = tuple(torch.randn(shape, dtype=torch.float64) for shape in layout.factor_shapes(SHAPE, RANK))
    if dead:
        factors[0][:, 0] = 0
    return tuple(factor * scale for factor, scale in zip(factors, (0.3, 2.0, 1.0, 0.7), strict=False))


def jacobian(layout, factors: tuple[Tensor, ...]) -> Tensor:
    """[numbers of W, numbers of all factors], by autograd."""
    rows = torch.autograd.functional.jacobian(lambda *each: layout.join(each).flatten(), factors)
    return torch.cat([row.flatten(1) for row in rows], dim=1)


def flat(tensors: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([each.flatten() for each in tensors])


@by_layout
def test_the_inner_product_is_that_of_the_weights(layout):
    one, other = some_factors(layout), tuple(torch.randn_like(each) for each in some_factors(layout))
    torch.testing.assert_close(layout.inner(one, other), (layout.join(one) * layout.join(other)).sum())


@by_layout
def test_at_the_factors_it_is_the_transposed_jacobian(layout):
    factors, M = some_factors(layout), torch.randn(SHAPE, dtype=torch.float64)
    got = layout.pulled_back(factors, M)
    torch.testing.assert_close(flat(got), jacobian(layout, factors).T @ M.flatten())


@by_layout
@pytest.mark.parametrize("dead", [False, True])
def test_at_the_weight_it_is_the_least_norm_least_squares_solution(layout, dead):
    """Of any moments of the factors, those that belong to no gradient of W included."""
    factors = some_factors(layout, dead=dead)
    moments = tuple(torch.randn_like(each) for each in factors)
    system = jacobian(layout, factors).T
    expected = torch.linalg.lstsq(system, flat(moments)[:, None], rcond=1e-10, driver="gelsd").solution.view(SHAPE)
    torch.testing.assert_close(layout.first_moment(factors, moments), expected, rtol=1e-5, atol=1e-6)


@by_layout
def test_moments_that_a_gradient_explains_are_reproduced(layout):
    factors, G = some_factors(layout), torch.randn(SHAPE, dtype=torch.float64)
    moments = layout.pulled_back(factors, G)
    M = layout.first_moment(factors, moments)
    error = flat(layout.pulled_back(factors, M)) - flat(moments)
    assert error.norm() < 1e-6 * flat(moments).norm()
    assert M.norm() <= G.norm(), "the part of it that the factors see"


def test_of_two_factors_both_are_what_lowrank_has_in_closed_form():
    torch.manual_seed(0)
    factors = (torch.randn(6, 3, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64))
    moments = tuple(torch.randn_like(each) for each in factors)
    torch.testing.assert_close(
        algebra.first_moment(product, inner, factors, moments), moments_to_dense(*moments, *factors)
    )
    squares = tuple(each.square() for each in moments)
    torch.testing.assert_close(
        algebra.second_moment(product, factors, squares, ((6, 1), (1, 5))),
        second_moments_to_dense(*squares, *factors),
    )
    M = torch.randn(6, 5, dtype=torch.float64)
    left, right = algebra.pulled_back(product, factors, M)
    torch.testing.assert_close(left, M @ factors[1].mT)
    torch.testing.assert_close(right, factors[0].mT @ M)


@by_layout
def test_nothing_explains_nothing(layout):
    factors = some_factors(layout)
    zeros, ones = (tuple(full(each) for each in factors) for full in (torch.zeros_like, torch.ones_like))
    for given, moments in ((factors, zeros), (zeros, ones)):
        assert not bool(layout.first_moment(given, moments).any())
        assert not bool(layout.second_moment(given, moments).any())


def of_signs(factors, f, size: Tensor) -> list[Tensor]:
    """E[G_i²] over independent signs of the entries of G, counted out in full."""
    count = size.numel()
    signs = torch.tensor([[1 - 2 * (k >> bit & 1) for bit in range(count)] for k in range(2**count)])
    pulled = torch.vmap(lambda G: algebra.pulled_back(f, factors, G))(signs.to(size).view(-1, *size.shape) * size)
    return [each.square().mean(0) for each in pulled]


@pytest.mark.parametrize(
    ("f", "shapes", "weight"),
    [
        pytest.param(product, ((2, 2), (2, 3)), (2, 3), id="two factors"),
        pytest.param(CPLayout().join, CPLayout().factor_shapes((2, 3, 2, 1), 2), (2, 3, 2, 1), id="cp"),
    ],
)
def test_second_moments_of_the_factors_are_those_of_uncorrelated_gradients(f, shapes, weight):
    torch.manual_seed(0)
    factors = tuple(torch.randn(shape, dtype=torch.float64) for shape in shapes)
    size = torch.rand(weight, dtype=torch.float64) + 0.1
    got = algebra.pulled_back(f, tuple(each.square() for each in factors), size.square())
    for mine, expected in zip(got, of_signs(factors, f, size), strict=True):
        torch.testing.assert_close(mine, expected)


def test_of_tuckers_factors_as_a_cut_makes_them_too_where_all_entries_of_v_are_alike():
    torch.manual_seed(0)
    layout, size = TuckerLayout(), torch.ones(3, 2, 2, dtype=torch.float64)
    factors = layout.split(torch.randn(3, 2, 2, dtype=torch.float64), 2)
    got = layout.pulled_back(tuple(each.square() for each in factors), size.square())
    for mine, expected in zip(got, of_signs(factors, layout.join, size), strict=True):
        torch.testing.assert_close(mine, expected)


@by_layout
@pytest.mark.parametrize("size", [1.0, 1e-12])
def test_a_second_moment_of_rank_one_is_recovered_exactly(layout, size):
    torch.manual_seed(0)
    factors = some_factors(layout)
    V = layout.join(tuple(torch.rand(s, dtype=torch.float64) + 0.1 for s in layout.factor_shapes(SHAPE, 1))) * size
    moments = layout.pulled_back(tuple(each.square() for each in factors), V)
    torch.testing.assert_close(layout.second_moment(factors, moments), V, rtol=1e-10, atol=0)


@by_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_results_have_the_dtype_of_the_factors_and_enough_of_its_precision(layout, dtype):
    factors = some_factors(layout)
    moments = layout.pulled_back(factors, torch.randn(SHAPE, dtype=torch.float64))
    M = layout.first_moment(*(tuple(each.to(dtype) for each in tensors) for tensors in (factors, moments)))
    assert M.dtype is layout.second_moment(tuple(each.to(dtype) for each in factors), moments).dtype is dtype
    error = flat(layout.pulled_back(factors, M.double())) - flat(moments)
    assert error.norm() < 300 * max(torch.finfo(dtype).eps, 1e-9) * flat(moments).norm()


# Of two factors, in closed form


def random_factors(g: int = 2, m: int = 6, n: int = 5, r: int = 3, dead: int = 0) -> tuple[Tensor, Tensor]:
    """Factors in float64, with the last ``dead`` directions of B missing, and the first ``dead`` of A."""
    B, A = torch.randn(g, m, r, dtype=torch.float64), torch.randn(g, r, n, dtype=torch.float64)
    if dead:
        mix = torch.randn(r, r, dtype=torch.float64)
        B = torch.cat([B[..., dead:], torch.zeros(g, m, dead, dtype=torch.float64)], -1) @ mix
        A = mix @ torch.cat([torch.zeros(g, dead, n, dtype=torch.float64), A[:, dead:]], 1)
    return B, A


@pytest.mark.parametrize(
    ("m", "n", "r", "dead"),
    [
        (m, n, r, dead)
        for m, n, r in ((6, 5, 3), (4, 7, 4), (5, 4, 1), (5, 5, 5), (3, 4, 6))
        for dead in range(min(r, 3))
    ],
)
def test_moments_of_the_weight_are_the_least_norm_least_squares_solution(m, n, r, dead):
    """min ‖M Aᵀ − M_B‖² + ‖Bᵀ M − M_A‖² over vec(M), by torch.linalg.lstsq."""
    torch.manual_seed(0)
    B, A = random_factors(1, m, n, r, dead)
    M_B, M_A = torch.randn_like(B), torch.randn_like(A)
    got = moments_to_dense(M_B, M_A, B, A)[0]
    eye_m, eye_n = torch.eye(m, dtype=torch.float64), torch.eye(n, dtype=torch.float64)
    # rows of vec: vec(M Aᵀ) = (I ⊗ A) vec(M) and vec(Bᵀ M) = (Bᵀ ⊗ I) vec(M)
    system = torch.cat([torch.kron(eye_m, A[0]), torch.kron(B[0].mT.contiguous(), eye_n)])
    target = torch.cat([M_B.flatten(), M_A.flatten()])
    expected = torch.linalg.lstsq(system, target[:, None], rcond=1e-12, driver="gelsd").solution.reshape(m, n)
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dead", [0, 1])
def test_consistent_moments_are_reproduced_exactly(dead):
    torch.manual_seed(0)
    B, A = random_factors(dead=dead)
    M = torch.randn(2, 6, 5, dtype=torch.float64)
    M_B, M_A = M @ A.mT, B.mT @ M
    again = moments_to_dense(M_B, M_A, B, A)
    torch.testing.assert_close(again @ A.mT, M_B, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(B.mT @ again, M_A, rtol=1e-10, atol=1e-10)


def test_moments_of_zero_factors_are_zero_and_finite():
    B, A = torch.zeros(1, 4, 2), torch.zeros(1, 2, 3)
    assert not bool(moments_to_dense(torch.ones_like(B), torch.ones_like(A), B, A).any())
    assert not bool(second_moments_to_dense(torch.ones_like(B), torch.ones_like(A), B, A).any())


def test_second_moments_to_dense_recover_a_rank_one_v_exactly():
    torch.manual_seed(0)
    B, A = random_factors()
    V = (torch.rand(2, 6, 1, dtype=torch.float64) + 0.1) * (torch.rand(2, 1, 5, dtype=torch.float64) + 0.1)
    V_B, V_A = V @ A.square().mT, B.square().mT @ V
    torch.testing.assert_close(second_moments_to_dense(V_B, V_A, B, A), V, rtol=1e-12, atol=0)


def test_second_moments_stay_nonnegative_and_finite():
    torch.manual_seed(0)
    B, A = random_factors(dead=1)
    V = torch.rand(2, 6, 5, dtype=torch.float64)
    back = second_moments_to_dense(V @ A.square().mT, B.square().mT @ V, B, A)
    assert bool(torch.isfinite(back).all())
    assert bool((back >= 0).all())
