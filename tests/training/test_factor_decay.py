"""Decay of the product of the factors, against the penalty written into the loss, or the update written out."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from factored_pair import Pair
from torch import Tensor, nn

import dynrank_fx as dr
from dynrank_fx.rewrite import Switched, switched_modules

RATE, DECAY = 0.05, 0.3
COUPLED: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda ps, **o: torch.optim.SGD(ps, lr=RATE, momentum=0.9, **o),
    "nesterov": lambda ps, **o: torch.optim.SGD(ps, lr=RATE, momentum=0.9, nesterov=True, **o),
    "adam": lambda ps, **o: torch.optim.Adam(ps, lr=RATE, **o),
    "fused adam": lambda ps, **o: torch.optim.Adam(ps, lr=RATE, fused=True, **o),
    "rmsprop": lambda ps, **o: torch.optim.RMSprop(ps, lr=RATE, **o),
}
DECOUPLED: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": lambda ps, **o: torch.optim.AdamW(ps, lr=RATE, **o),
    "tensor rate": lambda ps, **o: torch.optim.AdamW(ps, lr=torch.tensor(RATE), foreach=False, **o),
    "nadam": lambda ps, **o: torch.optim.NAdam(ps, lr=RATE, decoupled_weight_decay=True, **o),
}


def low(share: bool = False) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(5, 7, 12, dtype=torch.float64)
    net = dr.transform(Pair().double(), (x,), rank=dr.Ratio(0.5), allow_unprofitable=True, share_inputs=share)
    dr.enter_(net, dr.Phase.LOW)
    return net, x


def firsts(net: nn.Module) -> list[Switched]:
    return [modules[0] for modules in switched_modules(net).values()]


def penalty(net: nn.Module) -> Tensor:
    return sum((site.layout.join(site.factors).square().sum() for site in firsts(net)), torch.zeros(()))


def others(net: nn.Module) -> Tensor:
    """What is no factor decays as ever."""
    factors = {id(f) for site in firsts(net) for f in site.factors}
    return sum((p.square().sum() for p in net.parameters() if id(p) not in factors), torch.zeros(()))


def agree(a: nn.Module, b: nn.Module) -> None:
    for (name, mine), theirs in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("share", [False, True], ids=["", "one right factor"])
@pytest.mark.parametrize("kind", COUPLED)
def test_through_the_gradient_it_is_the_penalty_in_the_loss(kind, share):
    net, x = low(share)
    reference = copy.deepcopy(net)
    optimizer = COUPLED[kind](net.parameters(), weight_decay=DECAY)
    plain = COUPLED[kind](reference.parameters())
    dr.factor_decay_(net, optimizer)
    for _ in range(4):
        net(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        (reference(x).square().mean() + DECAY / 2 * (penalty(reference) + others(reference))).backward()
        plain.step()
        plain.zero_grad()
    agree(net, reference)


@pytest.mark.parametrize("kind", DECOUPLED)
def test_beside_the_step_it_is_a_step_along_the_gradient_of_the_penalty(kind):
    net, x = low()
    reference = copy.deepcopy(net)
    optimizer = DECOUPLED[kind](net.parameters(), weight_decay=DECAY)
    plain = DECOUPLED[kind](reference.parameters(), weight_decay=0.0)
    dr.factor_decay_(net, optimizer)
    for _ in range(4):
        net(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        shrink = torch.autograd.grad(penalty(reference) / 2 + others(reference) / 2, list(reference.parameters()))
        reference(x).square().mean().backward()
        plain.step()
        plain.zero_grad()
        with torch.no_grad():
            for parameter, gradient in zip(reference.parameters(), shrink, strict=True):
                parameter.sub_(RATE * DECAY * gradient)
    agree(net, reference)


def test_halved_the_product_decays_as_a_dense_weight_would():
    net, _ = low()
    before = [site.weight.detach() for site in firsts(net)]
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, weight_decay=DECAY)
    dr.factor_decay_(net, optimizer, dr.Decay.HALVED)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for site, weight in zip(firsts(net), before, strict=True):
        torch.testing.assert_close(site.weight / weight, torch.full_like(weight, 1 - 1e-4 * DECAY), rtol=1e-9, atol=0)


def test_groups_keep_their_own_rates_and_what_decays_by_none_does_not():
    net, _ = low()
    a, b, conv = firsts(net)
    groups = [{"params": [*a.factors], "weight_decay": 0.0}, {"params": [*b.factors]}, {"params": [*conv.factors]}]
    optimizer = torch.optim.SGD(groups, lr=RATE, weight_decay=DECAY)
    dr.factor_decay_(net, optimizer)
    before = [[f.detach().clone() for f in site.factors] for site in (a, b)]
    for parameter in (*a.factors, *b.factors):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert all(torch.equal(f, old) for f, old in zip(a.factors, before[0], strict=True))
    B, A = before[1]
    torch.testing.assert_close(b.factors[0], B - RATE * DECAY * B @ A @ A.mT, check_dtype=False)


def test_in_full_and_beside_an_adaptor_the_optimizer_decays_alone():
    net, x = low()
    for phase in (dr.Phase.FULL, dr.Phase.ADAPTOR):
        dr.enter_(net, phase)
        reference = copy.deepcopy(net)
        optimizer = torch.optim.AdamW(net.parameters(), lr=RATE, weight_decay=DECAY)
        plain = torch.optim.AdamW(reference.parameters(), lr=RATE, weight_decay=DECAY)
        dr.factor_decay_(net, optimizer)
        for one, steps in ((net, optimizer), (reference, plain)):
            one(x).square().mean().backward()
            steps.step()
            steps.zero_grad()
        agree(net, reference)


@pytest.mark.parametrize("first", ["decay", "re-warm-up"])
def test_a_rewarm_lowers_the_decay_with_the_rate_whichever_came_first(first):
    net, _ = low()
    before = [site.weight.detach() for site in firsts(net)]
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, weight_decay=DECAY)
    hooks = [lambda: dr.factor_decay_(net, optimizer, dr.Decay.HALVED), lambda: dr.rewarm_(optimizer, 10)]
    for hook in hooks if first == "decay" else hooks[::-1]:
        hook()
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for site, weight in zip(firsts(net), before, strict=True):
        torch.testing.assert_close(site.weight / weight, torch.full_like(weight, 1 - 1e-5 * DECAY), rtol=1e-9, atol=0)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_a_step_with_a_closure_is_the_same_step(kind):
    net, x = low()
    reference = copy.deepcopy(net)
    make = (COUPLED | DECOUPLED)[kind]
    for one, closing in ((net, True), (reference, False)):
        optimizer = make(one.parameters(), weight_decay=DECAY)
        dr.factor_decay_(one, optimizer)

        def closure(one: nn.Module = one, optimizer: torch.optim.Optimizer = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = one(x).square().mean()
            loss.backward()
            return loss

        for _ in range(3):
            if closing:
                assert optimizer.step(closure).item() > 0
            else:
                closure()
                optimizer.step()
    agree(net, reference)


def test_maximize_and_a_gradient_scale():
    net, _ = low()
    site = firsts(net)[0]
    B, A = (f.detach().clone() for f in site.factors)
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE, weight_decay=DECAY, maximize=True)
    handle = dr.factor_decay_(net, optimizer)
    for factor in site.factors:
        factor.grad = torch.zeros_like(factor)
    optimizer.step()
    torch.testing.assert_close(site.factors[0], B - RATE * DECAY * B @ A @ A.mT)
    handle.remove()
    optimizer.step()  # by the optimizer's own decay again, and twice that of before
    assert torch.linalg.norm(site.factors[0]) < torch.linalg.norm(B)


def test_an_optimizer_that_nobody_knows_must_be_explained():
    class Mine(torch.optim.Optimizer):
        def step(self, closure=None):
            pass

    net, _ = low()
    mine = Mine(net.parameters(), {"lr": RATE, "weight_decay": DECAY})
    with pytest.raises(dr.TransitionError, match=r"how Mine decays weights is not known: say decoupled=True"):
        dr.factor_decay_(net, mine)
    dr.factor_decay_(net, mine, decoupled=True)


def test_what_does_not_say_what_decays():
    net, _ = low()
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE)
    sentence = r"'x' does not say what decays: give one of Decay\.EACH, Decay\.HALVED, Decay\.PRODUCT"
    with pytest.raises(dr.TransitionError, match=sentence):
        dr.factor_decay_(net, optimizer, "x")
    with pytest.raises(dr.TransitionError, match=r"decoupled is 'x': give True \(as AdamW\), False \(as SGD\) or None"):
        dr.factor_decay_(net, optimizer, decoupled="x")
    with pytest.raises(dr.TransitionError, match="Linear has no factors to decay: give what transform made of it"):
        dr.factor_decay_(torch.nn.Linear(4, 4), optimizer)
