"""Gradients at a switch, in the loops that people write: stale ones go, pending ones are those of the factors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from switching import Pair
from torch import Tensor, nn

import dynrank_fx as dr
from dynrank_fx.rewrite import switched_modules

FULL, LOW, ADAPTOR = dr.Phase.FULL, dr.Phase.LOW, dr.Phase.ADAPTOR
X = torch.randn(8, 12, generator=torch.Generator().manual_seed(1))


def made(**choices: object) -> nn.Module:
    torch.manual_seed(0)
    return dr.transform(
        nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8)), (X,), rank=dr.Fixed(2), **choices
    )


def loss(net: nn.Module, x: Tensor = X) -> Tensor:
    return (net(x) - 1).square().mean()


def plain(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    loss(net).backward()
    optimizer.step()


def zeros(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    loss(net).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)


def clipped(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    loss(net).backward()
    nn.utils.clip_grad_norm_(net.parameters(), 0.01)
    optimizer.step()


def with_closure(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(net)
        value.backward()
        return value

    optimizer.step(closure)


def accumulated(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    for x in X.split(4):
        loss(net, x).backward()
    optimizer.step()


def scaled(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer.zero_grad()
    scaler.scale(loss(net)).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()


def skipped(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Half of the gradients are finite, and the scaler takes no step."""
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer.zero_grad()
    scaler.scale(loss(net)).backward()
    net.get_submodule("2").bias.grad.fill_(torch.inf)
    scaler.step(optimizer)
    scaler.update()


LOOPS = (plain, zeros, clipped, with_closure, accumulated, scaled, skipped)


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW], ids=lambda kind: kind.__name__)
def test_the_usual_loops_switch_as_if_gradients_had_been_cleared(loop: Callable[..., None], make: type) -> None:
    runs = []
    for clears in (True, False):
        net = made()
        optimizer = make(net.parameters(), lr=0.1)
        for phase in (FULL, LOW, FULL, ADAPTOR, FULL, LOW):
            torch.manual_seed(3)  # an ADAPTOR begins at random
            dr.enter_(net, phase, optimizer)
            for _ in range(3):
                loop(net, optimizer)
            if clears:
                optimizer.zero_grad()
        runs.append(net.state_dict())
    assert all(map(torch.equal, runs[0].values(), runs[1].values()))


@pytest.mark.parametrize("known", [True, False], ids=["a hook on the optimizer", "the optimizer seen first"])
@pytest.mark.parametrize("phase", [LOW, ADAPTOR])
def test_gradients_that_wait_for_a_step_become_those_of_the_factors(phase: dr.Phase, known: bool) -> None:
    """By autograd: the gradient G at the weight as a loss, ⟨G, W⟩, of the net's own weight over its factors."""
    net = made().double()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    x = X.double()
    if known:
        dr.enter_(net, FULL, optimizer)
        loss(net, x).backward()
        optimizer.step()
        optimizer.zero_grad()
    loss(net, x[:4]).backward()
    waiting = {name: modules[0].weight.grad.clone() for name, modules in switched_modules(net).items()}
    bias = net.get_submodule("0").bias.grad.clone()
    dr.enter_(net, phase, optimizer)
    assert torch.equal(net.get_submodule("0").bias.grad, bias)
    for name, modules in switched_modules(net).items():
        expected = torch.autograd.grad((modules[0].weight * waiting[name]).sum(), modules[0].factors)
        for factor, gradient in zip(modules[0].factors, expected, strict=True):
            torch.testing.assert_close(factor.grad, gradient)
    before = [factor.grad.clone() for factor in net.get_submodule("0").factors]
    loss(net, x[4:]).backward()  # accumulation goes on
    assert not torch.equal(net.get_submodule("0").factors[0].grad, before[0])


def test_gradients_of_sites_that_share_a_factor_add_up_in_it() -> None:
    torch.manual_seed(0)
    net = dr.transform(Pair().double(), (torch.randn(2, 16, dtype=torch.float64),), rank=dr.Fixed(3), share_inputs=True)
    sites = {name: modules[0] for name, modules in switched_modules(net).items()}
    assert sites["b.weight"].owner
    loss(net, torch.randn(5, 16, dtype=torch.float64)).backward()
    waiting = {name: site.weight.grad.clone() for name, site in sites.items()}
    dr.enter_(net, LOW)
    factors = (sites["a.weight"].factors[0], sites["b.weight"].factors[0], sites["a.weight"].factors[1])
    total = sum((site.weight * waiting[name]).sum() for name, site in sites.items())
    for factor, gradient in zip(factors, torch.autograd.grad(total, factors), strict=True):
        torch.testing.assert_close(factor.grad, gradient)


@pytest.mark.parametrize("phase", [LOW, ADAPTOR])
def test_gradients_that_wait_at_factors_are_refused_in_words(phase: dr.Phase) -> None:
    net = made()
    optimizer = torch.optim.AdamW(net.parameters())
    dr.enter_(net, phase, optimizer)
    plain(net, optimizer)
    loss(net).backward()
    gradient = net.get_submodule("0").factors[1].grad
    with pytest.raises(dr.TransitionError, match=r"0\.weight has a pending gradient .* step the optimizer or call"):
        dr.enter_(net, FULL, optimizer)
    assert net.get_submodule("0").factors[1].grad is gradient
    optimizer.step()
    dr.enter_(net, FULL, optimizer)
    assert net.get_submodule("0").weight.grad is None


def test_a_switch_that_fails_keeps_the_gradients_that_wait() -> None:
    net = made()
    optimizer = torch.optim.AdamW(net.parameters())
    plain(net, optimizer)
    optimizer.zero_grad()
    loss(net).backward()
    before = {name: p.grad.clone() for name, p in net.named_parameters()}

    def fails_at_the_last(sites: list[str], *_: object) -> None:
        if sites[0] == "2.weight":
            raise MemoryError("no room")

    with pytest.raises(MemoryError):
        dr.enter_(net, LOW, optimizer, split=fails_at_the_last)
    assert all(torch.equal(p.grad, before[name]) for name, p in net.named_parameters())


def test_the_hook_is_one_for_each_optimizer_and_leaves_no_trace_in_its_state() -> None:
    net = made()
    optimizer = torch.optim.AdamW(net.parameters())
    for phase in (FULL, LOW, FULL):
        dr.enter_(net, phase, optimizer)
    assert len(optimizer._optimizer_step_post_hooks) == 1
    plain(net, optimizer)
    assert optimizer.state_dict().keys() == {"state", "param_groups"}
