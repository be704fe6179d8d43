"""Rank policies: from what is known of all sites to one rank per site."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

import dynrank_fx as dr
from dynrank_fx.plan import Curve


def curve(max_rank: int, spectrum: list[list[float]] | None = None) -> Curve:
    def measured() -> torch.Tensor:
        assert spectrum is not None, "a spectrum costs an SVD: nobody but Energy may ask for it"
        return torch.tensor(spectrum, dtype=torch.float64)

    return Curve("site", max_rank, measured)


def test_fixed_gives_every_site_its_rank_even_those_that_cannot_have_it():
    assert dr.Fixed(5).ranks([curve(9), curve(3), curve(5)]) == [5, 5, 5]
    assert dr.Fixed(5).ranks([]) == []


def test_a_fixed_rank_over_every_limit_is_refused_with_the_largest():
    with pytest.raises(dr.PlanError, match="rank 10 is over the limit of every site \\(the largest is 9\\); give 9"):
        dr.Fixed(10).ranks([curve(9), curve(3)])


@pytest.mark.parametrize("percent", range(1, 101))
def test_ratio_is_the_exact_floor_and_at_least_one(percent):
    """0.29 · 100 is 28.999… in binary."""
    sizes = (1, 7, 64, 100, 1000, 4096)
    expected = [max(1, math.floor(Fraction(percent, 100) * size)) for size in sizes]
    assert dr.Ratio(percent / 100).ranks([curve(size) for size in sizes]) == expected


def test_energy_is_the_least_rank_that_keeps_the_share_in_every_group():
    equal, steep = [[1.0] * 4], [[10.0, 1.0, 1.0, 1.0]]
    both = [steep[0], equal[0]]
    curves = [curve(4, equal), curve(4, steep), curve(4, both)]
    assert dr.Energy(0.75).ranks(curves) == [3, 1, 3]
    assert dr.Energy(0.98).ranks(curves) == [4, 2, 4]
    assert dr.Energy(1.0).ranks([*curves, curve(3, [[1.0, 0.0, 0.0]]), curve(2, [[0.0, 0.0]])]) == [4, 4, 4, 1, 1]


def test_energy_is_measured_on_the_weight():
    torch.manual_seed(0)
    layer = torch.nn.Linear(20, 16, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(16, 3) @ torch.randn(3, 20))
    net = dr.transform(torch.nn.Sequential(layer), rank=dr.Energy(0.999999))
    assert [row.rank for row in dr.plan_of(net).sites] == [3]


@pytest.mark.parametrize("policy", [dr.Fixed(3), dr.Ratio(0.5), dr.Energy(0.9)], ids=repr)
def test_policies_are_frozen_values(policy):
    assert policy == dataclasses.replace(policy)
    assert hash(policy) == hash(dataclasses.replace(policy))
    assert eval(repr(policy), vars(dr)) == policy
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(policy, dataclasses.fields(policy)[0].name, 1)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: dr.Fixed(0), "a rank of 0 cannot be; give a whole number of 1 or more"),
        (lambda: dr.Fixed(-4), "a rank of -4"),
        (lambda: dr.Fixed(2.5), "a rank of 2.5 cannot be; give a whole number of 1 or more"),
        (lambda: dr.Fixed(True), "a rank of True cannot be"),
        (lambda: dr.Ratio("0.5"), "a rank ratio of '0.5' is not a fraction; give one above 0"),
        (lambda: dr.Energy(None), "an energy of None is not a share"),
        (lambda: dr.StableRank("1"), "stable ranks cannot be scaled by '1'; give a number above 0"),
        (lambda: dr.StableRank(math.inf), "stable ranks cannot be scaled by inf"),
        (lambda: dr.Budget(params="0.5"), "a budget of '0.5' is no share of the dense model"),
        (lambda: dr.Budget(params=0.5, even="no"), "even is 'no': give True or False"),
        (lambda: dr.Ratio(0), "a rank ratio of 0 is not a fraction; give one above 0 and at most 1"),
        (lambda: dr.Ratio(1.5), "a rank ratio of 1.5"),
        (lambda: dr.Ratio(math.nan), "a rank ratio of nan"),
        (lambda: dr.Energy(0.0), "an energy of 0.0 is not a share"),
        (lambda: dr.Energy(95), "an energy of 95"),
        (lambda: dr.Energy(math.nan), "an energy of nan"),
    ],
)
def test_what_is_no_rank_is_refused_in_words(make, sentence):
    with pytest.raises(dr.PlanError, match=sentence):
        make()


def test_a_stable_rank_is_scaled_by_that_of_independent_entries():
    """stable(W) of independent entries is about mn / (√m + √n)²: such a weight keeps about all of its rank."""
    torch.manual_seed(0)
    curve = Curve("w", 200, lambda: torch.linalg.svdvals(torch.randn(1, 800, 200).double()), (800, 200))
    assert 190 <= dr.StableRank().ranks([curve])[0] <= 200
    assert 95 <= dr.StableRank(0.5).ranks([curve])[0] <= 105
    one = Curve("w", 200, lambda: torch.tensor([[3.0] + [0.0] * 199]), (800, 200))
    assert dr.StableRank().ranks([one]) == [3], "⌈1 · 200 / (800 · 200 / (√800 + √200)²)⌉"


@dataclasses.dataclass(frozen=True)
class Said:
    """A policy of one's own, which says whatever it is told to."""

    said: tuple

    def ranks(self, curves):
        return list(self.said)


@pytest.mark.parametrize("said", [(2.5, 2), (0, 2), (2,), ("2", 2)])
def test_what_a_policy_of_ones_own_gives_is_checked(said):
    model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 16))
    with pytest.raises(dr.PlanError, match=r"gave \[.* for 2 sites: it has to give one rank for each, a whole number"):
        dr.transform(model, rank=Said(said))


def test_a_policy_of_ones_own_may_count_with_numpy():
    model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 16))
    plan = dr.plan_of(dr.transform(model, rank=Said(tuple(np.array([2, 3])))))
    assert dr.Plan.from_json(plan.to_json()) == plan
