"""Convolutions in compress: whether their outputs or their inputs are cut, by what each loses on data."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dynrank_fx as dr


def narrow_inputs(groups: int = 1) -> tuple[nn.Module, list[tuple[Tensor]]]:
    """The second convolution reads 32 channels of which the first gives only 3 directions, and its outputs use all of
    their 16; the third reads 16 directions and gives 4.
    """
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 32, 1), nn.Conv2d(32, 16, 3, padding=1, groups=groups, bias=False)
    third = nn.Conv2d(16, 24, 3)
    with torch.no_grad():
        third.weight.copy_(torch.einsum("om,mikl->oikl", torch.randn(24, 4), torch.randn(4, 16, 3, 3)) / 12)
    return nn.Sequential(first, second, nn.Tanh(), third).eval(), [(torch.randn(8, 3, 7, 7),) for _ in range(3)]


def kernels(module: nn.Module) -> list[tuple[int, ...]]:
    return [part.kernel_size for part in module.modules() if isinstance(part, nn.Conv2d)]


def error(module: nn.Module, dense: nn.Module, batches: list[tuple[Tensor]]) -> float:
    with torch.no_grad():
        return sum(float((module(x) - dense(x)).square().mean()) for (x,) in batches)


@pytest.mark.parametrize("data", [True, False], ids=["on data", "by the weight"])
def test_each_convolution_is_cut_on_the_side_that_loses_less(data: bool) -> None:
    """The second at rank 3 or 4 of its inputs loses nothing on data, and the third none at rank 4 of its outputs."""
    model, batches = narrow_inputs()
    settings: dict[str, Any] = {"exclude": ["0.weight"]}
    found = dr.compress(model, batches[0], dr.Fixed(4), batches if data else None, **settings)
    assert kernels(found.module)[-2:] == [(3, 3), (1, 1)]
    if data:
        assert kernels(found.module)[1:3] == [(1, 1), (3, 3)]
        by_outputs = {**settings, "overrides": {"*": dr.Override(layout=dr.ChannelLayout)}}
        other = dr.compress(model, batches[0], dr.Fixed(4), batches, **by_outputs)
        assert kernels(other.module)[1:3] == [(3, 3), (1, 1)]
        assert error(found.module, model, batches) < 1e-5
        assert error(other.module, model, batches) > 1e-3


def test_in_groups_too() -> None:
    model, batches = narrow_inputs(groups=2)
    found = dr.compress(model, batches[0], dr.Fixed(4), batches, include=["1.weight"])
    assert kernels(found.module)[1:3] == [(1, 1), (3, 3)]
    assert error(found.module, model, batches) < 1e-5


def test_a_layout_that_is_asked_for_and_a_net_that_has_its_plan_keep_theirs() -> None:
    model, batches = narrow_inputs()
    asked = dr.compress(model, batches[0], dr.Fixed(4), batches, conv_layout=dr.SpatialLayout, include=["1.weight"])
    assert kernels(asked.module)[1:3] == [(3, 1), (1, 3)]
    net = dr.transform(model, batches[0], rank=dr.Fixed(4), include=["1.weight"])
    assert kernels(dr.compress(net, batches[0], dr.Fixed(4), batches).module)[1:3] == [(3, 3), (1, 1)]
