"""Ranks decided anew on the weights as they are."""

from __future__ import annotations

import torch
from planning import Perceptron, steep
from torch import Tensor, nn

import dynrank_fx as dr


def test_ranks_follow_the_weights_by_the_steps_of_the_grid():
    net = dr.transform(Perceptron(), (torch.randn(3, 40),), rank=dr.Fixed(8), exclude=["head"])
    net.load_state_dict(steep().state_dict())
    plan = dr.reranked(net, dr.Energy(0.99), ladder=8)
    assert {row.site.name: row.rank for row in plan.sites} == {"a.weight": 5, "b.weight": 15}
    assert {row.rank for row in dr.plan_of(net).sites} == {8}, "nothing is changed"
    optimizer = torch.optim.AdamW(net.parameters())
    dr.replan_(net, plan, optimizer)
    dr.enter_(net, dr.Phase.LOW, optimizer)
    assert net.get_parameter("a.left").shape == (40, 5)
    down = dr.reranked(net, dr.Budget(params=0.45), ladder=8)
    assert down.low_params <= 0.45 * down.total_params
    assert all(new.rank <= old.rank for new, old in zip(down.sites, plan.sites, strict=True))


def test_sites_of_one_factor_get_one_rank():
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) * self.b(x)

    net = dr.transform(Pair(), (torch.randn(2, 32),), share_inputs=True, rank=dr.Fixed(4))
    plan = dr.reranked(net, dr.Ratio(0.5))
    assert [row.rank for row in plan.sites] == [16, 16]
    dr.enter_(net, dr.Phase.LOW)
    dr.replan_(net, dr.reranked(net, dr.Ratio(0.1)))
    assert net.get_parameter("a.left").shape == (32, 4)
