"""Several optimizers over one net: each site stays with the one that held it, all of them or none change."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Muon, Optimizer

import dynrank_fx as dr
from dynrank_fx.rewrite import switched_modules

FULL, LOW, ADAPTOR = dr.Phase.FULL, dr.Phase.LOW, dr.Phase.ADAPTOR
X = torch.randn(8, 12, generator=torch.Generator().manual_seed(1))


def made() -> nn.Module:
    torch.manual_seed(0)
    return dr.transform(nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 12)), (X,), rank=dr.Fixed(2))


def halves(net: nn.Module) -> list[Optimizer]:
    one, two = (net.get_submodule(name).parameters() for name in "02")
    return [SGD(one, lr=0.1, momentum=0.9), AdamW([{"params": list(two), "lr": 0.01}])]


def train(net: nn.Module, optimizers: list[Optimizer], steps: int = 3) -> None:
    for _ in range(steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
        (net(X) - X).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()


def held(optimizer: Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def test_each_site_stays_with_its_optimizer_as_if_it_were_trained_alone() -> None:
    """Beside one optimizer with a group for each, which the carry of is tested elsewhere."""
    net, single = made(), made()
    optimizers = halves(net)
    both = SGD([{"params": list(single.get_submodule(name).parameters())} for name in "02"], lr=0.1, momentum=0.9)
    optimizers[1] = SGD(net.get_submodule("2").parameters(), lr=0.1, momentum=0.9)
    for phase in (FULL, LOW, FULL, ADAPTOR, LOW):
        torch.manual_seed(3)
        assert dr.enter_(net, phase, optimizers).carry in (None, dr.Carry.MOVE)
        torch.manual_seed(3)
        dr.enter_(single, phase, both)
        for optimizer, name in zip(optimizers, "02", strict=True):
            assert held(optimizer) == {id(p) for p in net.get_submodule(name).parameters()}
        train(net, optimizers)
        train(single, [both])
    assert all(map(torch.equal, net.state_dict().values(), single.state_dict().values()))
    dr.replan_(net, dr.plan_of(net).with_ranks({"2.weight": 1}), optimizers)
    assert held(optimizers[1]) == {id(p) for p in net.get_submodule("2").parameters()}
    assert net.get_submodule("2").factors[0].shape == (12, 1)


def test_a_site_that_trains_and_is_in_no_optimizer_is_named() -> None:
    net = made()
    one, two = halves(net)
    for given in (one, [one]):
        with pytest.raises(dr.TransitionError, match=r"^2\.weight trains, and no optimizer that was given holds it"):
            dr.enter_(net, LOW, given)
    with pytest.raises(dr.TransitionError, match=r"^0\.weight trains"):
        dr.replan_(net, dr.plan_of(net), two)
    assert set(dr.phases_of(net).values()) == {FULL}
    net.get_submodule("2").weight.requires_grad_(False)
    dr.enter_(net, LOW, one)
    assert set(dr.phases_of(net).values()) == {LOW}


def test_factors_of_one_site_in_two_optimizers_are_refused_in_words() -> None:
    net = made()
    dr.enter_(net, LOW)
    left, *rest = net.parameters()
    with pytest.raises(dr.TransitionError, match=r"parameters of 0\.weight are held by several optimizers"):
        dr.enter_(net, FULL, [SGD([left], lr=0.1), SGD(rest, lr=0.1)])


def test_a_failure_puts_all_of_them_back() -> None:
    net = made()
    optimizers = halves(net)
    train(net, optimizers)
    before = [copy.deepcopy(optimizer.state_dict()) for optimizer in optimizers]

    def fails_at_the_last(sites: list[str], *_: object) -> None:
        if sites[0] == "2.weight":
            raise MemoryError("no room")

    with pytest.raises(MemoryError):
        dr.enter_(net, LOW, optimizers, split=fails_at_the_last)
    for optimizer, state, name in zip(optimizers, before, "02", strict=True):
        assert held(optimizer) == {id(p) for p in net.get_submodule(name).parameters()}
        now = optimizer.state_dict()
        assert now["param_groups"] == state["param_groups"]
        for key, values in state["state"].items():
            assert all(torch.equal(now["state"][key][each], value) for each, value in values.items())


def test_muon_beside_adamw() -> None:
    """Muon's momentum maps as a gradient does: by autograd through the factors."""
    net = made()
    matrices = [p for p in net.parameters() if p.ndim == 2]
    optimizers = [Muon(matrices, lr=0.01), AdamW([p for p in net.parameters() if p.ndim != 2], lr=0.01)]
    train(net, optimizers)
    momenta = {name: optimizers[0].state[m[0].weight]["momentum_buffer"] for name, m in switched_modules(net).items()}
    dr.enter_(net, LOW, optimizers)
    for name, modules in switched_modules(net).items():
        expected = torch.autograd.grad((modules[0].weight * momenta[name]).sum(), modules[0].factors)
        for factor, momentum in zip(modules[0].factors, expected, strict=True):
            torch.testing.assert_close(optimizers[0].state[factor]["momentum_buffer"], momentum)
    for phase in (LOW, FULL, LOW):
        dr.enter_(net, phase, optimizers)
        before = [p.detach().clone() for p in net.parameters()]
        train(net, optimizers)
        assert not any(map(torch.equal, before, net.parameters()))


def test_phases_with_several_optimizers_land_decay_and_warm_each_site_once() -> None:
    """Beside one optimizer over all of them."""
    runs = []
    for several in (False, True):
        net = made()
        parts = [list(net.get_submodule(name).parameters()) for name in "02"]
        optimizers = [AdamW([{"params": part} for part in parts], lr=0.01, weight_decay=0.1)]
        if several:
            optimizers = [AdamW(part, lr=0.01, weight_decay=0.1) for part in parts]
        schedule = dr.schedules.interleave(low=1, full=2)
        choices = {"landing": True, "rewarm": 4, "decay": dr.Decay.PRODUCT}
        phases = dr.Phases(net, optimizers if several else optimizers[0], schedule, 6, steps=3, **choices)
        for epoch in range(5):
            phases.begin(epoch)
            train(net, optimizers)
        state = phases.hooks_state()
        assert state["rewarm"] == [4, *[1] * len(optimizers)]
        phases.remove()
        again = dr.Phases(net, optimizers if several else optimizers[0], schedule, 6, steps=3, **choices)
        again.load_hooks_state(state)
        assert again.hooks_state()["rewarm"] == state["rewarm"]
        again.remove()
        assert not any(each._optimizer_step_post_hooks or each._optimizer_step_pre_hooks for each in optimizers)
        runs.append(net.state_dict())
    assert all(map(torch.equal, runs[0].values(), runs[1].values()))
