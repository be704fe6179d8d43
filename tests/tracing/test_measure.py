"""One run on the example: shapes as they are on the data, FLOPs as torch counts them, and nothing left behind."""

from __future__ import annotations

import pytest
import torch
from capturing import CAPTURES
from torch import Tensor, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import dynrank_fx as dr
from dynrank_fx.tracing import flop_counter, measure


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


class Layered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.Linear(6, 5)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)) * scale)


def test_shapes_are_those_of_torchs_own_interpreter_and_flops_those_of_its_counter():
    torch.manual_seed(0)
    model, given = Layered().train(), (torch.randn(4, 3, 9, 8), torch.ones(6))
    net = dr.capture(model, given, how=dr.Capture.SYMBOLIC)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    measured = measure(net, given)
    traced = torch.fx.symbolic_trace(model)
    ShapeProp(traced).propagate(*given)
    expected = {
        node.name: [tuple(node.meta["tensor_meta"].shape)] for node in traced.graph.nodes if node.op != "output"
    }
    found = {node.name: shapes for node, shapes in measured.shapes.items() if node.op != "output"}
    assert found == expected
    assert measured.flops == counted(model.eval(), *given) > 0
    assert net.training
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items()), "no statistics are noted"
    assert measure(net, {"scale": given[1], "x": given[0]}).flops == measured.flops


def test_an_argument_without_a_value_is_named():
    net = dr.capture(Layered(), how=dr.Capture.SYMBOLIC)
    with pytest.raises(dr.CaptureError, match=r"^the example inputs have no value for the model's argument 'scale'$"):
        measure(net, (torch.randn(4, 3, 9, 8),))


class Repeating(nn.Module):
    """Untraced code that calls a layer three times and a part twice, on other sizes each time."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.part = nn.Linear(4, 4), nn.Sequential(nn.Tanh(), nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        for rows in (1, 2, 3) if float(x.detach().sum()) < 1e9 else ():
            self.layer(x[:rows])
        return self.part(x[:2]).sum() + self.part(x)


def test_untraced_code_is_measured_for_each_time_that_it_runs_a_layer_or_a_part():
    torch.manual_seed(0)
    model, x = Repeating(), torch.randn(5, 4)
    net = dr.capture(model, (x,), how=dr.Capture.MODULES)
    measured = measure(net, (x,))
    assert measured.shapes[net.layer] == [(1, 4), (2, 4), (3, 4)]
    (node,) = [node for node in net.part.graphs[False].nodes if node.op == "placeholder"]
    assert measured.shapes[node] == [(2, 4), (5, 4)]
    assert measured.flops == counted(model, x) == 2 * 16 * (1 + 2 + 3 + 2 + 5)
    assert "forward" not in vars(net.part)
    assert not net.layer._forward_pre_hooks


def test_the_attention_of_the_cpu_counts_as_its_two_products_do():
    q, k, v = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 8)
    totals = []
    for backend in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION):
        with sdpa_kernel(backend), flop_counter() as counter:
            nn.functional.scaled_dot_product_attention(q, k, v)
        totals.append(counter.get_total_flops())
    assert totals == [2 * 2 * 3 * 5 * 7 * (8 + 8)] * 2


def test_an_example_that_a_graph_was_told_not_to_serve_is_refused_in_words():
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
            return self.fc(x) if shift is None else self.fc(x) + shift

    with pytest.raises(
        dr.CaptureError, match=r"fails on the example inputs \(.*traced with shift, and serves no other"
    ):
        dr.transform(Optional(), (torch.randn(2, 8),), rank=dr.Fixed(1), how=dr.Capture.SYMBOLIC)
