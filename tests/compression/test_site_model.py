"""The ONNX model of one site alone: as large as the site, with its shapes, and computing what its op does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

import dynrank_fx as dr
from dynrank_fx.compression.site_model import site_model
from dynrank_fx.onnx import session_of


def conv(**settings: Any) -> nn.Module:
    return nn.Conv2d(8, 16, 3, **settings)


class Einsum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 8, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,ijk->bjk", x, self.w)


class Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 24))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w


@pytest.mark.parametrize(
    ("net", "x"),
    [
        (nn.Linear(8, 24), torch.randn(5, 8)),
        (Product(), torch.randn(5, 3, 8)),
        (conv(stride=2, padding=1), torch.randn(2, 8, 9, 9)),
        (conv(padding="same", groups=2), torch.randn(2, 8, 9, 9)),
        (conv(padding=(1, 2), padding_mode="reflect"), torch.randn(2, 8, 9, 9)),
        (nn.ConvTranspose2d(8, 16, 3, stride=2, output_padding=1), torch.randn(2, 8, 5, 5)),
        (nn.Embedding(30, 16), torch.randint(0, 30, (4, 7))),
        (Einsum(), torch.randn(5, 8)),
    ],
)
def test_a_sites_own_model_has_the_shapes_of_the_site(net: nn.Module, x: Tensor) -> None:
    plan = dr.plan_of(dr.transform(net, (x,), rank=dr.Fixed(2), allow_unprofitable=True))
    for rank in (None, 2):
        made = site_model(plan.sites, rank, np.float32)
        assert made is not None
        proto, feeds = made
        (y,) = session_of(proto.SerializeToString(), "CPUExecutionProvider").run(None, feeds)
        assert y.shape == tuple(net(x).shape)
        stored = sum(int(np.prod(each.dims)) for each in proto.graph.initializer)
        assert stored == (plan.sites[0].site.params if rank is None else plan.sites[0].params)


def test_sites_that_share_a_factor_are_timed_together() -> None:
    class QK(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.q(x) + self.k(x)

    for form, products in ((dr.Form.GRAPH, 3), (dr.Form.LAYERS, 4)):  # of layers each applies the factor for itself
        net = dr.transform(QK(), (torch.randn(4, 16),), rank=dr.Fixed(3), share_inputs=True, form=form)
        made = site_model(dr.plan_of(net).sites, 3, np.float32)
        assert made is not None
        assert [len(made[0].graph.node), len(made[0].graph.output)] == [products, 2]


@pytest.mark.parametrize(
    ("net", "x", "turned"),
    [
        (nn.Linear(8, 24, bias=False), torch.randn(5, 8), True),
        (Product(), torch.randn(5, 3, 8), False),
        (conv(stride=2, padding=1, bias=False), torch.randn(2, 8, 9, 9), False),
        (conv(padding="same", groups=2, bias=False), torch.randn(2, 8, 9, 9), False),
        (nn.ConvTranspose2d(8, 16, 3, stride=2, output_padding=1, bias=False), torch.randn(2, 8, 5, 5), False),
        (Einsum(), torch.randn(5, 8), False),
    ],
)
def test_it_computes_what_the_layer_does_with_that_weight(net: nn.Module, x: Tensor, turned: bool) -> None:
    """turned: the file holds the weight of a linear layer as the product takes it."""
    plan = dr.plan_of(dr.transform(net, (x,), rank=dr.Fixed(2), allow_unprofitable=True))
    made = site_model(plan.sites, None, np.float32)
    assert made is not None
    proto, feeds = made
    (y,) = session_of(proto.SerializeToString(), "CPUExecutionProvider").run(None, feeds)
    weight = torch.from_numpy(numpy_helper.to_array(proto.graph.initializer[0]).copy())
    (parameter,) = net.parameters()
    with torch.no_grad():
        parameter.copy_(weight.mT if turned else weight)
        torch.testing.assert_close(torch.from_numpy(y), net(torch.from_numpy(feeds["x0"])), rtol=1e-4, atol=1e-5)


def test_without_known_shapes_there_is_none() -> None:
    net = dr.transform(torch.fx.symbolic_trace(nn.Sequential(nn.Linear(8, 24))), rank=dr.Fixed(2))
    assert site_model(dr.plan_of(net).sites, None, np.float32) is None
