"""What sites cost, dense and at each rank: as torch counts it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from models import CASES

import dynrank_fx as dr
from dynrank_fx.plan import break_even_rank


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
        unmeasured = dataclasses.replace(row.site, uses=tuple(dr_use(use) for use in row.site.uses))
        assert break_even_rank(unmeasured, row.layout) == (by_params, None)


def dr_use(use: Any) -> Any:
    return dataclasses.replace(use, input_shape=None)
