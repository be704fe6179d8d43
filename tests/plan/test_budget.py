"""Ranks by a global budget, against exhaustive search; and ranks decided anew on trained weights."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from planning import steep

import dynrank_fx as dr
from dynrank_fx.plan.budget import Point, allocate


def best(points: list[list[Point]], room: float) -> float:
    """The least error of all that fits, by looking at everything."""
    choices = itertools.product(*points)
    return min(sum(p[1] for p in each) for each in choices if sum(p[0] for p in each) <= room + 1e-12)


def small_case(seed: int) -> tuple[list[list[Point]], float]:
    rng = random.Random(seed)
    points: list[list[Point]] = []
    for _ in range(rng.randint(2, 4)):
        energies = sorted((rng.random() ** 3 for _ in range(rng.randint(2, 5))), reverse=True)
        unit, total = rng.uniform(0.5, 2.0), sum(energies)
        row = [(unit * r, sum(energies[r:]) / total, r) for r in range(1, len(energies))]
        points.append([*row, (unit * len(energies) * rng.uniform(0.95, 1.4), 0.0, len(energies))])
    least, most = sum(row[0][0] for row in points), sum(row[-1][0] for row in points)
    return points, rng.uniform(least, most)


def test_the_allocation_against_exhaustive_search():
    """On 400 small cases, where a single step is a large part of everything."""
    gaps = []
    for seed in range(400):
        points, room = small_case(seed)
        chosen = [row[i] for row, i in zip(points, allocate(points, room), strict=True)]
        assert sum(p[0] for p in chosen) <= room + 1e-9
        found, optimum = sum(p[1] for p in chosen), best(points, room)
        assert found >= optimum - 1e-12
        gaps.append(found - optimum)
    exact = sum(gap < 1e-9 for gap in gaps)
    assert exact >= 365, exact
    assert sum(gaps) / len(gaps) < 0.004, sum(gaps) / len(gaps)
    assert max(gaps) < 0.25, max(gaps)


def test_with_fine_steps_the_allocation_is_within_one_step_of_the_optimum():
    """The relaxed optimum (fractions of a step allowed) is a bound from below, found here by bisection."""
    torch.manual_seed(0)
    points = []
    for scale in (1.0, 2.0, 0.5):
        energies = torch.rand(200).pow(4).sort(descending=True).values
        tail = (energies.sum() - energies.cumsum(0)) / energies.sum()
        points.append([(scale * r / 200, float(tail[r - 1]), r) for r in range(1, 201)])
    for room in (0.3, 1.0, 2.5):
        low, high = 0.0, 1e3
        for _ in range(200):
            price = (low + high) / 2
            each = [min(row, key=lambda p, price=price: p[1] + price * p[0]) for row in points]
            low, high = (low, price) if sum(p[0] for p in each) <= room else (price, high)
        dual = sum(p[1] for p in each) + high * (sum(p[0] for p in each) - room)
        found = sum(row[i][1] for row, i in zip(points, allocate(points, room), strict=True))
        assert dual - 1e-9 <= found <= dual + 0.01


@pytest.mark.parametrize("share", [0.2, 0.3, 0.4, 0.5])
@pytest.mark.parametrize("what", ["params", "flops"])
def test_the_whole_model_keeps_to_the_budget(what, share):
    net = dr.transform(steep(), (torch.randn(3, 40),), rank=dr.Budget(**{what: share}), exclude=["head"])
    plan = dr.plan_of(net)
    low, total = (plan.low_params, plan.total_params) if what == "params" else (plan.low_flops, plan.total_flops)
    assert low <= share * total
    assert low > 0.9 * share * total or not plan.sites, "and uses it"


def test_ranks_go_where_the_spectrum_needs_them():
    net = dr.transform(steep(), (torch.randn(3, 40),), rank=dr.Budget(params=0.5), exclude=["head"])
    ranks = {row.site.name: row.rank for row in dr.plan_of(net).sites}
    assert ranks["a.weight"] < ranks["b.weight"]


def test_what_other_policies_take_is_counted():
    overrides = {"a": dr.Override(rank=dr.Fixed(2))}
    net = dr.transform(
        steep(), (torch.randn(3, 40),), rank=dr.Budget(params=0.5), exclude=["head"], overrides=overrides
    )
    plan = dr.plan_of(net)
    assert 0.45 < plan.low_params / plan.total_params <= 0.5


def test_one_ratio_for_all_that_keeps_to_a_budget():
    plan = dr.plan_of(dr.transform(steep(), (torch.randn(3, 40),), rank=dr.Budget(params=0.5, even=True)))
    assert len({row.rank for row in plan.sites if row.site.shape == (40, 40)}) == 1
    more = {row.rank + 1 for row in plan.sites if row.site.shape == (40, 40)}.pop()
    assert plan.low_params <= 0.5 * plan.total_params < plan.low_params + 2 * 80 + more


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        (lambda: dr.Budget(), "a budget is of something"),
        (lambda: dr.Budget(params=0.5, flops=0), "no share of the dense model"),
        (lambda: dr.Budget(flops=1.5), "no share of the dense model"),
    ],
)
def test_a_budget_that_is_none(budget, words):
    with pytest.raises(dr.PlanError, match=words):
        budget()


def test_a_budget_that_cannot_be_met_says_the_least_that_can():
    with pytest.raises(
        dr.PlanError, match=r"0\.01 of the dense parameters cannot be met: .* still takes (0\.\d+)"
    ) as e:
        dr.transform(steep(), (torch.randn(3, 40),), rank=dr.Budget(params=0.01))
    least = float(str(e.value).split("takes ")[1].split()[0])
    net = dr.transform(steep(), (torch.randn(3, 40),), rank=dr.Budget(params=least + 1e-4))
    assert {row.rank for row in dr.plan_of(net).sites} == {1}
    with pytest.raises(dr.PlanError, match="FLOPs of the sites are unknown: give example inputs"):
        dr.transform(steep(), rank=dr.Budget(flops=0.5))
