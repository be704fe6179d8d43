"""Steps in the measure of the product, against the update written out and against what the weight moves by."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from factored_pair import Pair
from torch import Tensor, nn

import dynrank_fx as dr
from dynrank_fx.errors import TransitionError
from dynrank_fx.rewrite import Switched, switched_modules
from dynrank_fx.training.factor_steps import _grams_of_the_other, _largest

RATE, DECAY = 0.05, 0.3
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=RATE, momentum=0.9, weight_decay=DECAY),
    "adam": lambda ps: torch.optim.Adam(ps, lr=RATE, weight_decay=DECAY),
    "fused adam": lambda ps: torch.optim.Adam(ps, lr=RATE, fused=True),
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=RATE, weight_decay=DECAY),
    "tensor rate": lambda ps: torch.optim.AdamW(ps, lr=torch.tensor(RATE), foreach=False, weight_decay=DECAY),
    "groups": lambda ps: torch.optim.AdamW([{"params": [p], "lr": RATE / (i + 1)} for i, p in enumerate(ps)]),
}
BESIDE = ("adamw", "tensor rate", "groups")  # what decays beside its step


def low(share: bool = False, larger: float = 3.0) -> tuple[nn.Module, Tensor]:
    """A net in LOW whose weights are so many times as large as they begin."""
    torch.manual_seed(0)
    model, x = Pair().double(), torch.randn(5, 7, 12, dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(larger)
    net = dr.transform(model, (x,), rank=dr.Ratio(0.5), allow_unprofitable=True, share_inputs=share)
    dr.enter_(net, dr.Phase.LOW)
    return net, x


def firsts(net: nn.Module) -> dict[str, Switched]:
    return {name: modules[0] for name, modules in switched_modules(net).items()}


def matrices(site: Switched) -> tuple[list[Tensor], list[Tensor]]:
    """B and A of each group, written out for a linear and a grouped convolution."""
    left, right = (factor.detach() for factor in site.factors)
    groups = 2 if left.ndim > 2 else 1
    A = right.unflatten(0, (groups, -1)).flatten(2)
    return list(left.flatten(1).unflatten(0, (groups, -1))), list(A)


def size(of: list[Tensor]) -> Tensor:
    """The largest singular value of all groups, as the 64th root of the sum of the 64th powers."""
    return torch.stack([torch.linalg.svdvals(each).pow(64).sum() ** (1 / 64) for each in of]).max()


@pytest.mark.parametrize("share", [False, True], ids=["", "one right factor"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_step_is_the_optimizers_over_the_size_of_the_other_factor(kind, share):
    net, x = low(share)
    plain = copy.deepcopy(net)
    optimizer, of_plain = OPTIMIZERS[kind](list(net.parameters())), OPTIMIZERS[kind](list(plain.parameters()))
    dr.factor_steps_(net, optimizer)
    for _ in range(3):
        with torch.no_grad():
            for mine, theirs in zip(net.parameters(), plain.parameters(), strict=True):
                theirs.copy_(mine)
        others: dict[str, list[Tensor]] = {}
        names = {id(p): name for name, p in net.named_parameters()}
        for site in firsts(net).values():
            (B, A), (left, right) = matrices(site), site.factors
            others[names[id(left)]] = A
            above = others.get(names[id(right)], [each[:0] for each in B])
            others[names[id(right)]] = [torch.cat(pair) for pair in zip(above, B, strict=True)]
        sizes = {name: size(of) for name, of in others.items()}
        before = {name: p.detach().clone() for name, p in net.named_parameters()}
        for one, steps in ((net, optimizer), (plain, of_plain)):
            one(x).square().mean().backward()
            steps.step()
            steps.zero_grad()
        rates = {id(p): group for group in of_plain.param_groups for p in group["params"]}
        for (name, mine), theirs in zip(net.named_parameters(), plain.parameters(), strict=True):
            wanted = theirs.detach()
            if name in sizes:
                over = sizes[name].clamp(min=1) ** (2 if kind == "sgd" else 1)
                group = rates[id(theirs)]
                kept = before[name] * (1 - group["lr"] * group["weight_decay"]) if kind in BESIDE else before[name]
                wanted = kept + (wanted - kept) / over
            torch.testing.assert_close(mine.detach(), wanted, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("larger", [3.0, 30.0])
def test_a_step_of_muon_moves_a_weight_as_far_however_large_its_factors_are(larger):
    net, x = low(larger=larger)
    site = firsts(net)["a.weight"]
    left, right = site.factors
    optimizer = torch.optim.Muon([left], lr=RATE, weight_decay=0.0)
    dr.factor_steps_(net, optimizer)
    old = site.weight.detach().clone()
    net(x).square().mean().backward()
    optimizer.step()
    # Muon's r orthogonal columns are √(m / r) long. Its five iterations leave singular values of 0.7 to 1.2.
    longest = RATE * (left.shape[0] / right.shape[0]) ** 0.5
    assert 0.5 < torch.linalg.matrix_norm(site.weight - old, 2) / longest < 1.2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_the_largest_singular_value_is_met_within_a_few_percent(dtype, scale):
    torch.manual_seed(0)
    site = firsts(low()[0])["a.weight"]
    factors = [nn.Parameter((torch.randn_like(each) * scale).to(dtype)) for each in site.factors]
    for_left, for_right = (each.sqrt() for each in _largest(_grams_of_the_other(site.layout, factors)))
    left, right = (torch.linalg.matrix_norm(each.detach().double(), 2) for each in factors)
    assert 1 - 1e-5 < for_left / right < 6 ** (1 / 64) + 1e-5
    assert 1 - 1e-5 < for_right / left < 6 ** (1 / 64) + 1e-5


def test_what_is_small_or_full_or_no_factor_moves_as_ever():
    for larger, phase in ((0.1, dr.Phase.LOW), (3.0, dr.Phase.FULL)):
        net, x = low(larger=larger)
        dr.enter_(net, phase)
        plain = copy.deepcopy(net)
        optimizer, of_plain = OPTIMIZERS["adamw"](net.parameters()), OPTIMIZERS["adamw"](plain.parameters())
        dr.factor_steps_(net, optimizer)
        for one, steps in ((net, optimizer), (plain, of_plain)):
            one(x).square().mean().backward()
            steps.step()
        for mine, theirs in zip(net.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs)


def test_a_factor_without_a_gradient_stays_and_one_with_a_closure_moves():
    net, x = low()
    frozen = firsts(net)["a.weight"].factors
    for factor in frozen:
        factor.requires_grad_(False)
    optimizer = OPTIMIZERS["adamw"](net.parameters())
    dr.factor_steps_(net, optimizer)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    plain = copy.deepcopy(net)

    def closure() -> Tensor:
        loss = net(x).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters() if name in ("a.left", "a.right"))
    moved = OPTIMIZERS["adamw"](plain.parameters())
    plain(x).square().mean().backward()
    moved.step()
    for name, factor in plain.named_parameters():
        if name in ("b.left", "b.right"):
            mine = dict(net.named_parameters())[name]
            assert (mine - before[name]).norm() < 0.9 * (factor - before[name]).norm()


def test_removed_or_not_asked_for_the_optimizer_is_alone():
    net, _ = low()
    optimizer = OPTIMIZERS["adamw"](net.parameters())
    dr.factor_steps_(net, optimizer, dr.Steps.EACH)
    with dr.factor_steps_(net, optimizer):
        with pytest.raises(TransitionError, match=r"AdamW: its steps are shortened already"):
            dr.factor_steps_(net, optimizer)
        assert optimizer._optimizer_step_post_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_phases_shorten_steps_and_leave_the_decay_of_the_product_as_it_is():
    net, x = low()
    twin = copy.deepcopy(net)
    optimizer, by_hand = OPTIMIZERS["adamw"](net.parameters()), OPTIMIZERS["adamw"](twin.parameters())
    choices = {"decay": dr.Decay.PRODUCT, "factor_steps": dr.Steps.PRODUCT}
    phases = dr.Phases(net, optimizer, dr.schedules.always(dr.Phase.LOW), 2, steps=3, **choices)
    dr.factor_steps_(twin, by_hand)
    dr.factor_decay_(twin, by_hand)
    for one, steps in ((net, optimizer), (twin, by_hand)):
        for _ in range(3):
            one(x).square().mean().backward()
            steps.step()
            steps.zero_grad()
    for mine, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)
    phases.remove()
    assert not optimizer._optimizer_step_post_hooks


def test_what_cannot_be_is_refused():
    net, _ = low()
    optimizer = OPTIMIZERS["adamw"](net.parameters())
    with pytest.raises(TransitionError, match=r"does not say how far factors move: give one of Steps\.EACH"):
        dr.factor_steps_(net, optimizer, "product")
    with pytest.raises(TransitionError, match="Linear has no factors that move"):
        dr.factor_steps_(nn.Linear(3, 3), optimizer)
    with (
        dr.factor_decay_(net, optimizer),
        pytest.raises(TransitionError, match="factor_decay_ comes after factor_steps_"),
    ):
        dr.factor_steps_(net, optimizer)
    phases = dr.Phases(net, optimizer, dr.schedules.always(dr.Phase.LOW), 2, steps=3)
    with pytest.raises(TransitionError, match="give factor_steps to Phases"):
        dr.factor_steps_(net, optimizer)
    phases.remove()

    class Own(torch.optim.Optimizer):
        def __init__(self) -> None:
            super().__init__(net.parameters(), {"weight_decay": 0.1, "lr": 0.1})

    with pytest.raises(TransitionError, match="how Own decays weights is not known: say decoupled=True"):
        dr.factor_steps_(net, Own())
    dr.factor_steps_(net, Own(), decoupled=True)
