"""torch.compile: one graph per setting and grad mode, then none; compiled equals eager; never a silent eager run."""

from __future__ import annotations

import itertools

import pytest
import torch
from models import Modal, gradients, randomized
from torch import nn
from torch._dynamo.testing import CompileCounter

import dynrank_fx as dr

CAPTURES = (dr.Capture.SYMBOLIC, pytest.param(dr.Capture.EXPORT, marks=pytest.mark.fuzz))
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))


class FourSites(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def four_sites(how: dr.Capture, device: str = "cpu") -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(5, 8, device=device)
    net = dr.transform(randomized(FourSites()).to(device), (x,), rank=dr.Ratio(0.5), how=how, allow_unprofitable=True)
    return net, x


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("how", CAPTURES, ids=lambda how: how.name)
def test_twenty_switches_cost_one_graph_per_phase_and_grad_mode(how):
    net, x = four_sites(how)
    counter = CompileCounter()
    step = torch.compile(net, fullgraph=True, backend=counter)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    for switch in range(20):
        dr.enter_(net, dr.Phase.LOW if switch % 2 else dr.Phase.FULL, optimizer)
        net.train()
        step(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        net.eval()
        with torch.no_grad():
            step(x)
        assert counter.frame_count == min(2 * (switch + 1), 4)


@pytest.mark.parametrize("how", CAPTURES, ids=lambda how: how.name)
def test_all_mixed_settings_compile_once_and_equal_eager(how):
    """More settings than Dynamo's limit of 8 per code object, and flags that differ by site only."""
    net, x = four_sites(how)
    counter = CompileCounter()
    compiled = torch.compile(net, fullgraph=True, backend=counter)
    names = list(dr.phases_of(net))
    settings = [
        dict(zip(names, phases, strict=True)) for phases in itertools.product((dr.Phase.FULL, dr.Phase.LOW), repeat=4)
    ]
    for seen, setting in enumerate([*settings, *settings]):
        dr.enter_(net, setting)
        assert dr.phases_of(net) == setting
        expected, expected_gradients = net(x), gradients(net, x)
        got, got_gradients = compiled(x), {}
        net.zero_grad()
        compiled(x).square().mean().backward()
        got_gradients = {name: p.grad for name, p in net.named_parameters()}
        net.zero_grad()
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
        assert got_gradients.keys() == expected_gradients.keys()
        for name, gradient in expected_gradients.items():
            torch.testing.assert_close(got_gradients[name], gradient, rtol=0, atol=0)
        assert counter.frame_count == min(seen + 1, 16)


def test_three_phases_compile_to_a_graph_each():
    net, x = four_sites(dr.Capture.SYMBOLIC)
    counter = CompileCounter()
    compiled = torch.compile(net, fullgraph=True, backend=counter, dynamic=False)
    for count, phase in enumerate([*dr.Phase, *dr.Phase], start=1):
        dr.enter_(net, phase)
        assert torch.equal(compiled(x), net(x))
        assert counter.frame_count == min(count, 3)


def test_a_rank_change_costs_one_graph_however_often():
    net, x = four_sites(dr.Capture.SYMBOLIC)
    counter = CompileCounter()
    compiled = torch.compile(net, fullgraph=True, backend=counter, dynamic=False)
    name = next(iter(dr.phases_of(net)))
    dr.enter_(net, dr.Phase.LOW)
    compiled(x)
    for count, rank in enumerate([3, 2, 5, 6, 7, 1, 8, 3, 2, 5, 4], start=2):
        dr.replan_(net, dr.plan_of(net).with_ranks({name: rank}))
        assert torch.equal(compiled(x), net(x))
        assert counter.frame_count == min(count, 8), "ranks seen before are found again"


def test_a_ragged_batch_and_a_copy_run_compiled_too():
    net, x = four_sites(dr.Capture.SYMBOLIC)
    counter = CompileCounter()
    compiled = torch.compile(net, fullgraph=True, backend=counter, dynamic=False)
    for phase in (dr.Phase.LOW, dr.Phase.FULL, dr.Phase.LOW, dr.Phase.FULL):
        dr.enter_(net, phase)
        for batch in (x, x[:3], x, x[:3]):
            assert torch.equal(compiled(batch), net(batch))
    assert counter.frame_count == 4


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_inductor_equals_eager_in_both_phases_forward_and_gradients(device, dtype):
    torch.manual_seed(0)
    x = torch.randn(4, 4, 6, 6, device=device)
    net = dr.transform(randomized(Modal()).to(device), (x,), rank=dr.Ratio(0.5), allow_unprofitable=True)
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # inductor draws other random numbers than eager
    compiled = torch.compile(net, fullgraph=True, dynamic=False)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 3e-2, "atol": 3e-2}
    for phase in (dr.Phase.LOW, dr.Phase.FULL, dr.Phase.ADAPTOR, dr.Phase.LOW):
        dr.enter_(net, phase)
        results = []
        for run in (net, compiled):
            net.zero_grad()
            with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
                output = run(x)
            output.float().square().mean().backward()
            results.append((output.float(), {name: p.grad for name, p in net.named_parameters()}))
        net.zero_grad()
        (expected, expected_gradients), (got, got_gradients) = results
        torch.testing.assert_close(got, expected, **tolerance)
        for name, gradient in expected_gradients.items():
            torch.testing.assert_close(got_gradients[name], gradient, msg=name, **tolerance)
