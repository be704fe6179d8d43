"""One run on the example: shapes as they are on the data, FLOPs as torch counts them, and nothing left behind."""

from __future__ import annotations

import pytest
import torch
from capturing import CAPTURES
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import dynrank_fx as dr


def counted(model: nn.Module, *args: Tensor) -> int:
    """The FLOPs of a call, by torch's own counter."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*args)
    return counter.get_total_flops()


class Queries(nn.Module):
    """A parameter as the input of a layer, and a shape that depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.fc, self.head = nn.Parameter(torch.randn(3, 8)), nn.Linear(8, 8), nn.Linear(8, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        kept = x[(x.sum(1) > 0).nonzero()[:, 0]]
        return self.head(kept).sum(0) + self.head(torch.tanh(self.fc(self.query))).sum(0)


def test_a_shape_that_depends_on_the_data_is_measured_on_the_data_and_nothing_is_left_behind():
    torch.manual_seed(0)
    model, x = Queries(), torch.randn(6, 8)
    kept = int((x.sum(1) > 0).sum())
    net = dr.capture(model, (x,), how=dr.Capture.SYMBOLIC)
    keep, state = x.clone(), torch.get_rng_state()
    plan = dr.make_plan(net, dr.Fixed(1), (x,))
    assert [row.site.flops for row in plan.sites] == [2 * 3 * 64, 2 * (3 + kept) * 32]
    assert plan.total_flops == sum(row.site.flops for row in plan.sites)
    assert float(net.calls) == 0
    assert torch.equal(x, keep)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("how", [*CAPTURES, None], ids=str)
def test_a_parameter_as_the_input_of_a_layer_is_measured_too(how):
    class Asked(Queries):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(x).sum(0) + self.head(self.fc(self.query)).sum(0)

    torch.manual_seed(0)
    model, x = Asked(), torch.randn(6, 8)
    plan = dr.plan_of(dr.transform(model, (x,), rank=dr.Fixed(1), how=how))
    assert {row.site.name: row.site.flops for row in plan.sites} == {
        "fc.weight": 2 * 3 * 64,
        "head.weight": 2 * (3 + 6) * 32,
    }


def test_attention_is_counted_though_its_fast_path_would_hide_it():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    plan = dr.make_plan(dr.capture(model, (x,)), dr.Ratio(0.25), (x,))
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        # torch's counter does not know the fused attention of the CPU: its two products, batch 2 · (5·5·16) each.
        products = 2 * 2 * (2 * 5 * 5 * 16)
        with sdpa_kernel(SDPBackend.MATH):
            assert plan.total_flops == counted(model, x) == 40960 + products
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
