"""What sites cost, dense and at each rank: as torch counts it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from models import CASES
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import dynrank_fx as dr
from dynrank_fx.layouts import layout_for
from dynrank_fx.ops import ConvOp, LinearOp
from dynrank_fx.plan import Metric, break_even_rank, costs_of, curve_of, spectrum_of
from dynrank_fx.plan.costs import rows_of
from dynrank_fx.plan.site import Site, Use


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("layout", [dr.ChannelLayout, dr.SpatialLayout], ids=lambda layout: layout.name)
def test_break_even_is_the_largest_rank_that_costs_less(case, layout):
    torch.manual_seed(0)
    x = (case.inputs(),)
    net = dr.capture(case.model(), x)
    plan = dr.make_plan(net, dr.Ratio(1.0), x, conv_layout=layout, allow_unprofitable=True)
    for row in plan.sites:
        every = [dataclasses.replace(row, rank=r) for r in range(1, row.layout.max_rank(row.site.shape) + 1)]
        by_params = max((r.rank for r in every if r.params < row.site.params), default=0)
        by_flops = max((r.rank for r in every if r.flops < row.site.flops), default=0)
        assert break_even_rank(row.site, row.layout) == (by_params, by_flops)
        unmeasured = dataclasses.replace(row.site, uses=tuple(unmeasured_use(use) for use in row.site.uses))
        assert break_even_rank(unmeasured, row.layout) == (by_params, None)


def unmeasured_use(use: Any) -> Any:
    return dataclasses.replace(use, input_shape=None)


def site(weight: tuple[int, ...], *inputs: tuple[int, ...] | None, name: str = "w") -> Site:
    return Site(name, weight, tuple(Use(LinearOp(), shape) for shape in inputs))


TOTALS = {Metric.PARAMS: 1000, Metric.FLOPS: 50_000}
LAYOUT = layout_for(LinearOp())


def low(weight: tuple[int, ...], rank: int, *inputs: tuple[int, ...]) -> tuple[int, int]:
    """Parameters and FLOPs of a linear that really is two, as torch counts them."""
    model = nn.Sequential(nn.Linear(weight[1], rank, bias=False), nn.Linear(rank, weight[0], bias=False))
    with FlopCounterMode(display=False) as counter:
        for shape in inputs:
            model(torch.zeros(shape))
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops()


def test_costs_are_shares_of_the_models_totals_dense_and_at_every_rank():
    inputs = ((2, 8), (3, 4, 8))
    costs = costs_of([site((10, 8), *inputs)], LAYOUT, TOTALS)
    assert costs[Metric.PARAMS].dense == 80 / 1000
    assert costs[Metric.FLOPS].dense == 2 * 80 * (2 + 12) / 50_000
    for rank in (1, 3, 8):
        params, flops = low((10, 8), rank, *inputs)
        assert costs[Metric.PARAMS].at(rank) == params / 1000
        assert costs[Metric.FLOPS].at(rank) == flops / 50_000


def test_sites_that_share_a_factor_pay_for_it_once():
    group = [site((10, 8), (2, 8), name="q"), site((6, 8), (2, 8), name="k")]
    costs = costs_of(group, LAYOUT, TOTALS)
    params, flops = low((16, 8), 3, (2, 8))  # as one linear with the outputs of both
    assert costs[Metric.PARAMS].at(3) == pytest.approx(params / 1000)
    assert costs[Metric.FLOPS].at(3) == pytest.approx(flops / 50_000)
    assert [row.sharing for row in rows_of(group, LAYOUT, 3)] == [("q", "k")] * 2
    assert [row.sharing for row in rows_of(group[:1], LAYOUT, 3)] == [()]


def test_what_is_not_known_of_the_model_has_no_cost():
    costs = costs_of([site((10, 8), None)], LAYOUT, {Metric.PARAMS: 1000, Metric.FLOPS: None})
    assert set(costs) == {Metric.PARAMS}
    training_only = costs_of([site((10, 8), None)], LAYOUT, TOTALS)[Metric.FLOPS]
    assert (training_only.dense, training_only.at(3)) == (0, 0)


def test_a_curve_is_of_the_weights_of_all_its_sites_and_asks_for_their_spectrum_late():
    asked = []
    group = [site((10, 24), name="q"), site((6, 24), name="k")]
    curve = curve_of(group, LAYOUT, lambda: asked.append(1) or torch.ones(1, 16), {}, multiple_of=5)
    assert (curve.name, curve.max_rank, curve.matrix, curve.grid) == ("q", 16, (16, 24), (5, 10, 15, 16))
    assert not asked
    assert curve.spectrum().shape == (1, 16)
    assert curve_of(group, LAYOUT, torch.ones, {}, steps=4).grid == (4, 8, 12, 16)
    assert curve_of(group, LAYOUT, torch.ones, {}).grid == ()


def test_the_spectrum_is_that_of_the_weights_one_above_the_other_and_of_each_group():
    torch.manual_seed(0)
    one, two = torch.randn(5, 7), torch.randn(4, 7)
    stacked = torch.linalg.svdvals(torch.cat([one, two]).double())
    torch.testing.assert_close(spectrum_of(LAYOUT, [one, two])[0].double(), stacked)
    torch.testing.assert_close(spectrum_of(LAYOUT, [one])[0].double(), torch.linalg.svdvals(one.double()))
    kernel = torch.randn(6, 4, 3, 3)  # two groups of three channels
    layout = layout_for(ConvOp((1, 1), (0, 0), (1, 1), groups=2))
    expected = torch.linalg.svdvals(kernel.double().reshape(2, 3, 36))
    torch.testing.assert_close(spectrum_of(layout, [kernel]).double(), expected)
