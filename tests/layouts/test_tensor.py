"""Tucker-2 and CP: factors against known tensors and bounds, convolutions against the weight they join to."""

from __future__ import annotations

import copy

import pytest
import torch
from models import gradients
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import dynrank_fx as dr
from dynrank_fx.layouts import CPLayout, TuckerLayout, layout_for
from dynrank_fx.ops import ConvOp
from dynrank_fx.rewrite import switched_modules

BOTH = (dr.TuckerLayout, dr.CPLayout)
FULL, LOW, ADAPTOR = dr.Phase


def tail(matrix: Tensor, rank: int) -> float:
    return float(torch.linalg.svdvals(matrix)[rank:].square().sum())


@pytest.mark.parametrize("shape", [(12, 8, 3, 3), (6, 10, 5, 1), (9, 9, 3), (4, 6, 3, 3, 3)])
def test_tucker_is_exact_at_full_rank_and_within_its_bounds_below(shape):
    torch.manual_seed(0)
    W, layout = torch.randn(shape, dtype=torch.float64), TuckerLayout()
    limit = layout.max_rank(shape)
    torch.testing.assert_close(layout.join(layout.split(W, limit)), W)
    for rank in range(1, limit, 2):
        factors = layout.split(W, rank)
        assert [tuple(f.shape) for f in factors] == list(layout.factor_shapes(shape, rank))
        error = float((layout.join(factors) - W).square().sum())
        r, s = layout.channels(shape, rank)
        outputs, inputs = tail(W.flatten(1), r), tail(W.transpose(0, 1).flatten(1), s)
        assert max(outputs, inputs) - 1e-9 <= error <= outputs + inputs + 1e-9, (
            "between the two unfoldings and their sum"
        )
        norms = [float(f.norm()) for f in factors]
        assert max(norms) < 1.001 * min(norms)


def test_tucker_finds_a_tensor_of_its_rank():
    torch.manual_seed(0)
    layout, shape = TuckerLayout(), (16, 8, 3, 3)
    W = layout.join(tuple(torch.randn(s, dtype=torch.float64) for s in layout.factor_shapes(shape, 6)))
    assert layout.channels(shape, 6) == (6, 3)
    torch.testing.assert_close(layout.join(layout.split(W, 6)), W)


def test_cp_finds_a_tensor_of_its_rank_and_gets_better_with_rank():
    torch.manual_seed(0)
    layout, shape = CPLayout(), (12, 10, 3, 3)
    W = layout.join(tuple(torch.randn(s, dtype=torch.float64) for s in layout.factor_shapes(shape, 3)))
    error = (layout.join(layout.split(W, 3)) - W).norm() / W.norm()
    assert error < 1e-3
    W = torch.randn(shape, dtype=torch.float64)
    errors = [float((layout.join(layout.split(W, rank)) - W).norm() / W.norm()) for rank in (1, 4, 8, 12)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.75
    left, along, across, right = layout.split(W, 5)
    lengths = torch.stack(
        [left.flatten(2).norm(dim=0)[:, 0], *(f.flatten(1).norm(dim=1) for f in (along, across, right))]
    )
    torch.testing.assert_close(lengths, lengths[:1].expand_as(lengths))


@pytest.mark.parametrize("layout", BOTH, ids=lambda layout: layout.name)
@pytest.mark.parametrize("value", [0.0, 1e-30, 1e20])
def test_weights_of_any_size_give_finite_factors(layout, value):
    factors = layout().split(torch.full((4, 6, 3, 3), value), 2)
    assert all(bool(torch.isfinite(factor).all()) for factor in factors)
    assert sum(not bool(factor.any()) for factor in factors) == (value == 0), "two zero factors could never train"


@pytest.mark.parametrize("layout", BOTH, ids=lambda layout: layout.name)
@pytest.mark.parametrize(
    "settings",
    [
        {"padding": 1},
        {"stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)},
        {"padding": "same", "dilation": 2},
        {"padding": (1, 2), "padding_mode": "reflect"},
        {"padding": 1, "padding_mode": "circular", "stride": 2},
    ],
    ids=str,
)
def test_the_stages_are_the_convolution_with_the_joined_weight(layout, settings):
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 10, 3, **settings).double()
    x = torch.randn(2, 6, 11, 13, dtype=torch.float64)
    net = dr.transform(nn.Sequential(conv), (x,), rank=dr.Fixed(4), conv_layout=layout, allow_unprofitable=True)
    dr.enter_(net, LOW)
    (site,) = switched_modules(net)["0.weight"]
    assert site.layout.name == layout.name
    with torch.no_grad():
        conv.weight.copy_(site.weight)
    torch.testing.assert_close(net(x), conv(x))
    assert dr.plan_of(net).sites[0].params == sum(f.numel() for f in site.factors)


class Mixed(nn.Module):
    """An ordinary convolution, one in groups, a transposed one, one along one axis, and a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(6, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.grouped, self.up = nn.Conv2d(12, 12, 3, padding=1, groups=2), nn.ConvTranspose2d(12, 8, 2, stride=2)
        self.head = nn.Linear(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.up(torch.relu(self.grouped(self.norm(self.conv(x)))))).mean((2, 3)))


def mixed(layout: type, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(3, 6, 8, 8, dtype=dtype)
    net = dr.transform(Mixed().to(dtype), (x,), rank=dr.Ratio(0.5), conv_layout=layout, allow_unprofitable=True)
    return net, x


@pytest.mark.parametrize("layout", BOTH, ids=lambda layout: layout.name)
class TestANet:
    def test_what_the_layout_does_not_serve_takes_the_channel_layout(self, layout):
        plan = dr.plan_of(mixed(layout)[0])
        names = {row.site.name: row.layout.name for row in plan.sites}
        assert names == {
            "conv.weight": layout.name,
            "grouped.weight": "channel",
            "up.weight": "channel",
            "head.weight": "linear",
        }
        assert dr.Plan.from_json(plan.to_json()) == plan

    def test_inflate_keeps_the_function_and_truncate_equals_low(self, layout):
        net, x = mixed(layout)
        dr.enter_(net.eval(), LOW)
        low = net(x)
        small = dr.truncate(net)
        torch.testing.assert_close(small(x), low)
        torch.testing.assert_close(small(torch.cat([x, x])), torch.cat([low, low]))
        assert not any(type(module).__module__.startswith("dynrank_fx") for module in small.modules())
        dr.enter_(net, FULL)
        torch.testing.assert_close(net(x), low)

    def test_an_adaptor_starts_at_the_function(self, layout):
        net, x = mixed(layout)
        before = net.eval()(x)
        dr.enter_(net, ADAPTOR)
        torch.testing.assert_close(net(x), before)
        (site,) = switched_modules(net)["conv.weight"]
        with torch.no_grad():
            for factor in site.factors:
                factor.normal_()
        expected = net(x)
        torch.testing.assert_close(dr.inline(net)(x), expected)
        dr.enter_(net, FULL)
        torch.testing.assert_close(net(x), expected)

    def test_it_trains_compiled_as_eagerly_with_one_graph_a_phase(self, layout):
        net, x = mixed(layout)
        counter = CompileCounter()
        compiled = torch.compile(net, fullgraph=True, backend=counter, dynamic=False)
        for count, phase in enumerate((LOW, FULL, ADAPTOR, LOW), start=1):
            dr.enter_(net, phase)
            expected = gradients(net, x)
            net.zero_grad()
            compiled(x).square().mean().backward()
            for name, parameter in net.named_parameters():
                torch.testing.assert_close(parameter.grad, expected[name])
            net.zero_grad()
            assert counter.frame_count == min(count, 3)
        torch._dynamo.reset()

    def test_saved_and_loaded_it_is_the_same(self, layout, tmp_path):
        net, x = mixed(layout)
        dr.enter_(net.eval(), LOW)
        dr.save(net, tmp_path / "net")
        again = dr.load(tmp_path / "net", Mixed().double(), (x,)).eval()
        assert torch.equal(again(x), net(x))
        twin = copy.deepcopy(net)
        dr.enter_(twin, FULL)
        assert dr.phases_of(net)["conv.weight"] is LOW

    def test_onnxruntime_agrees(self, layout, tmp_path):
        net, x = mixed(layout, torch.float32)
        dr.enter_(net.eval(), LOW)
        assert dr.export_onnx(dr.truncate(net), (x,), tmp_path / "m.onnx")

    def test_moments_are_pulled_back_to_the_factors(self, layout):
        """A gradient at W is, at the factors, what autograd gives: so the momentum of one such step must be too."""
        net, x = mixed(layout)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.0, momentum=0.9)
        (site,) = switched_modules(net)["conv.weight"]
        net(x).square().mean().backward()
        G = site.weight.grad.clone()
        optimizer.step()
        optimizer.zero_grad()
        dr.enter_(net, LOW, optimizer)
        joined = site.layout.join(site.factors)
        expected = torch.autograd.grad((joined * G).sum(), site.factors)
        for factor, gradient in zip(site.factors, expected, strict=True):
            torch.testing.assert_close(optimizer.state[factor]["momentum_buffer"], gradient)

    @pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
    def test_an_optimizer_goes_along_before_its_first_step_and_after(self, layout, make):
        net, x = mixed(layout)
        optimizer = make(net.parameters(), lr=1e-3)
        for phase in (LOW, FULL, ADAPTOR, LOW, FULL, LOW):
            dr.enter_(net, phase, optimizer)
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            assert held == {id(p) for p in net.parameters()}
            if phase is not LOW or optimizer.state:
                net(x).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()

    def test_the_product_decays_by_the_gradient_of_its_norm(self, layout):
        net, _ = mixed(layout)
        dr.enter_(net, LOW)
        (site,) = switched_modules(net)["conv.weight"]
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=0.2)
        dr.factor_decay_(net, optimizer)
        before = [f.detach().clone().requires_grad_() for f in site.factors]
        expected = torch.autograd.grad(site.layout.join(tuple(before)).square().sum() / 2, before)
        for parameter in net.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        for factor, old, gradient in zip(site.factors, before, expected, strict=True):
            torch.testing.assert_close(factor, old - 0.1 * 0.2 * gradient)

    def test_random_factors_have_the_scale_of_what_they_replace(self, layout):
        torch.manual_seed(0)
        conv = nn.Conv2d(64, 96, 3)
        net = dr.transform(
            nn.Sequential(conv),
            (torch.randn(1, 64, 4, 4),),
            rank=dr.Fixed(32),
            conv_layout=layout,
            allow_unprofitable=True,
        )
        dr.enter_(net, LOW)
        (site,) = switched_modules(net)["0.weight"]
        before = float(site.weight.detach().norm())
        dr.randomize_(net)
        assert float(site.weight.detach().norm()) == pytest.approx(before, rel=0.25)


def test_a_convolution_along_one_axis_has_no_cp():
    op = ConvOp((1,), (0,), (1,))
    assert layout_for(op, CPLayout).name == "channel"
    assert layout_for(op, TuckerLayout).name == "tucker"
