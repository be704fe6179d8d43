"""An optimizer's groups and state, when one parameter takes the place of others."""

from __future__ import annotations

import torch
from torch import nn

import dynrank_fx as dr


def test_each_new_parameter_stands_in_the_group_and_place_of_the_one_it_replaces():
    torch.manual_seed(0)
    net = dr.transform(
        nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)),
        (torch.randn(2, 8),),
        rank=dr.Ratio(0.5),
        allow_unprofitable=True,
    )
    first, second = (net.get_submodule(name) for name in "01")
    optimizer = torch.optim.AdamW(
        [
            {"params": [("0.weight", first.weight), ("0.bias", first.bias)], "lr": 0.1, "weight_decay": 0.5},
            {"params": [("1.bias", second.bias), ("1.weight", second.weight)], "lr": 0.2},
        ]
    )
    dr.enter_(net, dr.Phase.LOW, optimizer)
    one, two = optimizer.param_groups
    assert [id(p) for p in one["params"]] == [id(p) for p in (*first.factors, first.bias)]
    assert [id(p) for p in two["params"]] == [id(p) for p in (second.bias, *second.factors)]
    assert one["param_names"] == ["0.left", "0.right", "0.bias"]
    assert (one["lr"], one["weight_decay"], two["lr"]) == (0.1, 0.5, 0.2)
    dr.enter_(net, dr.Phase.FULL, optimizer)
    assert one["param_names"] == ["0.weight", "0.bias"]
    assert [id(p) for p in two["params"]] == [id(second.bias), id(second.weight)]
