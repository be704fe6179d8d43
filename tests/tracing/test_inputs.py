"""Example inputs in every form that users have them, and at other batch sizes."""

from __future__ import annotations

import pytest
import torch
from capturing import assert_alike, both_captures, linears
from torch import Tensor, nn

import dynrank_fx as dr


@both_captures
@pytest.mark.parametrize(
    ("form", "positions", "keywords"),
    [
        (lambda x, y: (x, y), "xy", ""),
        (lambda x, y: [x, y], "xy", ""),
        (lambda x, y: {"x": x, "y": y}, "", "xy"),
        (lambda x, y: {"y": y, "x": x}, "", "yx"),
        (lambda x, y: ((x,), {"y": y}), "x", "y"),
        (lambda x, y: ((), {"x": x, "y": y}), "", "xy"),
        (lambda x, y: ((x, y), {}), "xy", ""),
    ],
    ids=["tuple", "list", "dict", "dict in another order", "pair", "pair of keywords", "pair of positions"],
)
def test_example_inputs_come_in_every_documented_form(form, positions, keywords, how):
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 6), nn.Linear(4, 6)

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(x), self.b(y)

    torch.manual_seed(0)
    model, x, y = Two(), torch.randn(3, 8), torch.randn(3, 4)
    net = dr.transform(model, form(x, y), rank=dr.Fixed(1), how=how)
    flops = {row.site.name: row.site.flops for row in dr.plan_of(net).sites}
    assert flops == {"a.weight": 2 * 3 * 48, "b.weight": 2 * 3 * 24}
    given = {"x": torch.randn(5, 8), "y": torch.randn(5, 4)}
    args, kwargs = [given[name] for name in positions], {name: given[name] for name in keywords}
    assert_alike(net, model, *args, **kwargs)


def test_one_tensor_stands_for_a_tuple_of_it():
    x = torch.randn(3, 8)
    assert dr.plan_of(dr.transform(linears(), x, rank=dr.Fixed(2))).total_flops == 2 * 2 * 3 * 96
    with pytest.raises(dr.CaptureError, match="example inputs of type str are not understood: give a tuple"):
        dr.capture(linears(), "x")
