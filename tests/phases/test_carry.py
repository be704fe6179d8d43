"""Carrying optimizer state: the first update after a switch against gradients replayed in the new coordinates.

The replay is independent of the carry: a fresh torch optimizer over the new parameters is stepped at learning rate 0
through the history of gradients, mapped by autograd (dense to factors) or solved for (factors to dense), and then
takes the same step.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import dynrank_fx as dr
from dynrank_fx.rewrite import Switched, switched_modules

STEPS = 12
LAYERS = {
    "linear": (lambda: nn.Linear(10, 8, bias=False), torch.randn(3, 10), dr.ChannelLayout),
    "conv": (lambda: nn.Conv2d(4, 6, 3, bias=False), torch.randn(2, 4, 6, 6), dr.ChannelLayout),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False), torch.randn(2, 4, 6, 6), dr.ChannelLayout),
    "tucker": (lambda: nn.Conv2d(4, 6, 3, bias=False), torch.randn(2, 4, 6, 6), dr.TuckerLayout),
    "cp": (lambda: nn.Conv2d(4, 6, 3, bias=False), torch.randn(2, 4, 6, 6), dr.CPLayout),
}
SGD: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "momentum": lambda ps, lr: torch.optim.SGD(ps, lr=lr, momentum=0.9),
    "nesterov": lambda ps, lr: torch.optim.SGD(ps, lr=lr, momentum=0.9, nesterov=True),
    "dampened": lambda ps, lr: torch.optim.SGD(ps, lr=lr, momentum=0.8, dampening=0.3),
    "foreach": lambda ps, lr: torch.optim.SGD(ps, lr=lr, momentum=0.9, foreach=True),
    "fused": lambda ps, lr: torch.optim.SGD(ps, lr=lr, momentum=0.9, fused=True),
}
ADAM: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": lambda ps, lr: torch.optim.Adam(ps, lr=lr),
    "adamw": lambda ps, lr: torch.optim.AdamW(ps, lr=lr, weight_decay=0.0),
    "amsgrad": lambda ps, lr: torch.optim.AdamW(ps, lr=lr, weight_decay=0.0, amsgrad=True),
    "foreach": lambda ps, lr: torch.optim.Adam(ps, lr=lr, foreach=True),
    "fused": lambda ps, lr: torch.optim.AdamW(ps, lr=lr, weight_decay=0.0, fused=True),
    "tensor lr": lambda ps, lr: torch.optim.Adam(ps, lr=torch.tensor(float(lr))),
    "capturable": pytest.param(
        lambda ps, lr: torch.optim.AdamW(ps, lr=lr, weight_decay=0.0, capturable=True), marks=pytest.mark.gpu
    ),
}


def one_site(kind: str, rank: float = 0.5, device: str = "cpu") -> tuple[nn.Module, Switched]:
    torch.manual_seed(0)
    make, x, layout = LAYERS[kind]
    net = dr.transform(
        nn.Sequential(make()), (x,), rank=dr.Ratio(rank), conv_layout=layout, allow_unprofitable=True
    ).to(device)
    return net, switched_modules(net)["0.weight"][0]


def history(shape: torch.Size, device: str = "cpu") -> list[Tensor]:
    """Gradients with a mean, as in training."""
    generator = torch.Generator().manual_seed(3)
    mean = torch.randn(shape, generator=generator) * 0.5
    return [(mean + torch.randn(shape, generator=generator)).to(device) for _ in range(STEPS + 1)]


def feed(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], gradients: list[list[Tensor]]) -> None:
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient.clone(memory_format=torch.contiguous_format)  # as backward leaves it
        optimizer.step()
    optimizer.zero_grad()


def in_factors(module: Switched, gradient: Tensor) -> list[Tensor]:
    """The gradients of all factors by autograd through the layout's join."""
    factors = [f.detach().clone().requires_grad_() for f in module.factors]
    return list(torch.autograd.grad(module.layout.join(tuple(factors)), factors, gradient))


def freeze(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(float(lr)) if isinstance(group["lr"], Tensor) else lr


@pytest.mark.parametrize("make", SGD.values(), ids=SGD)
@pytest.mark.parametrize("kind", LAYERS)
def test_sgd_dense_to_factors_takes_the_replayed_step(kind, make):
    net, module = one_site(kind)
    gradients = history(module.shape)
    optimizer = make(net.parameters(), 0.0)
    feed(optimizer, [module.weight], [[g] for g in gradients[:-1]])
    dr.enter_(net, dr.Phase.LOW, optimizer)
    mapped = [in_factors(module, g) for g in gradients]
    replay = [nn.Parameter(f.detach().clone()) for f in module.factors]
    reference = make(replay, 0.0)
    feed(reference, replay, mapped[:-1])
    for one, parameters in ((optimizer, list(module.factors)), (reference, replay)):
        freeze(one, 0.1)
        feed(one, parameters, mapped[-1:])
    for got, expected in zip(module.factors, replay, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("make", SGD.values(), ids=SGD)
@pytest.mark.parametrize("kind", LAYERS)
def test_sgd_factors_to_dense_takes_the_step_of_the_moment_that_explains_both(kind, make):
    """The replayed dense moment can be known only as far as the factors' gradients show it: its least-norm part."""
    net, module = one_site(kind)
    optimizer = make(net.parameters(), 0.0)
    dr.enter_(net, dr.Phase.LOW, optimizer)
    gradients = history(module.shape)
    factors = [f.detach().clone() for f in module.factors]
    feed(optimizer, list(module.factors), [in_factors(module, g) for g in gradients[:-1]])
    seen = [visible(module, factors, g) for g in gradients[:-1]]
    dr.enter_(net, dr.Phase.FULL, optimizer)
    replay = nn.Parameter(module.weight.detach().clone())
    reference = make([replay], 0.0)
    feed(reference, [replay], [[g] for g in seen])
    for one, parameter in ((optimizer, module.weight), (reference, replay)):
        freeze(one, 0.1)
        feed(one, [parameter], [[gradients[-1]]])
    torch.testing.assert_close(module.weight, replay, rtol=1e-4, atol=1e-5)


def visible(module: Switched, factors: list[Tensor], gradient: Tensor) -> Tensor:
    """The part of a dense gradient that reaches the factors: its projection on the row space of the map to
    theirs.
    """
    parts = [f.clone().requires_grad_() for f in factors]
    joined = module.layout.join(tuple(parts))
    every = torch.eye(gradient.numel()).to(gradient).view(-1, *joined.shape)
    rows = torch.autograd.grad(joined, parts, every, is_grads_batched=True)
    matrix = torch.cat([row.flatten(1) for row in rows], dim=1).T.double()
    return (torch.linalg.pinv(matrix, rtol=1e-6) @ (matrix @ gradient.double().flatten())).float().view(gradient.shape)


@pytest.mark.parametrize("make", ADAM.values(), ids=ADAM)
@pytest.mark.parametrize("kind", LAYERS)
class TestAdam:
    def test_dense_to_factors_moves_the_first_moment_exactly_and_bounds_the_step(self, kind, make):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        net, module = one_site(kind, device=device)
        gradients = history(module.shape, device)
        optimizer = make(net.parameters(), 0.0)
        feed(optimizer, [module.weight], [[g] for g in gradients[:-1]])
        dr.enter_(net, dr.Phase.LOW, optimizer)
        mapped = [in_factors(module, g) for g in gradients]
        replay = [nn.Parameter(f.detach().clone()) for f in module.factors]
        reference = make(replay, 0.0)
        feed(reference, replay, mapped[:-1])
        for got, expected in zip(module.factors, replay, strict=True):
            mine, theirs = optimizer.state[got], reference.state[expected]
            torch.testing.assert_close(mine["exp_avg"], theirs["exp_avg"], rtol=1e-4, atol=1e-6)
            assert mine.keys() == theirs.keys()
            assert float(mine["step"]) == float(theirs["step"]) == STEPS
            # Entries of G are taken as uncorrelated: right on the whole, not entry by entry.
            ratio = (mine["exp_avg_sq"].sum() / theirs["exp_avg_sq"].sum()).sqrt()
            assert 0.5 < ratio < 2
        self.same_direction(optimizer, list(module.factors), reference, replay, mapped[-1])

    def test_factors_to_dense_moves_the_first_moment_exactly_and_bounds_the_step(self, kind, make):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        net, module = one_site(kind, rank=1.0, device=device)
        optimizer = make(net.parameters(), 0.0)
        dr.enter_(net, dr.Phase.LOW, optimizer)
        gradients = history(module.shape, device)
        factors = [f.detach().clone() for f in module.factors]
        feed(optimizer, list(module.factors), [in_factors(module, g) for g in gradients[:-1]])
        dr.enter_(net, dr.Phase.FULL, optimizer)
        # CP factors see part of a gradient at their full rank too; the second moment is to be that of all of it.
        replay, shown = (nn.Parameter(module.weight.detach().clone()) for _ in range(2))
        reference = make([replay, shown], 0.0)
        feed(reference, [replay, shown], [[g, visible(module, factors, g)] for g in gradients[:-1]])
        mine, theirs = optimizer.state[module.weight], reference.state[replay]
        theirs["exp_avg"] = reference.state[shown]["exp_avg"]
        torch.testing.assert_close(mine["exp_avg"], theirs["exp_avg"], rtol=1e-3, atol=1e-4)
        assert float(mine["step"]) == STEPS
        ratio = (mine["exp_avg_sq"].sum() / theirs["exp_avg_sq"].sum()).sqrt()
        assert 0.4 < ratio < 2.5
        self.same_direction(optimizer, [module.weight], reference, [replay], [gradients[-1]])

    def same_direction(self, optimizer, parameters, reference, replay, gradients):
        """The replayed step within what a rough second moment allows, and no entry farther than Adam ever goes."""
        before = [p.detach().clone() for p in parameters]
        lr = 0.01
        for one, new in ((optimizer, parameters), (reference, replay)):
            freeze(one, lr)
            feed(one, new, [gradients])
        mine = torch.cat([(p.detach() - b).flatten() for p, b in zip(parameters, before, strict=True)])
        theirs = torch.cat([(p.detach() - b).flatten() for p, b in zip(replay, before, strict=True)])
        assert torch.cosine_similarity(mine, theirs, dim=0) > 0.9
        assert 0.5 < mine.norm() / theirs.norm() < 2
        assert mine.abs().max() <= 3.2 * lr  # (1 - β1) / √(1 - β2) is the bound of Adam itself


class Lion(torch.optim.Optimizer):
    """As in many packages (arXiv 2302.06675): one mean of gradients, and no counter."""

    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99)):
        super().__init__(params, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                mean = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.sub_(group["lr"] * torch.lerp(p.grad, mean, beta1).sign())
                mean.lerp_(p.grad, 1 - beta2)


# What each keeps: linear in the gradients, quadratic, roots of such, and counters.
OTHERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], str, str]] = {
    "nadam": (lambda ps, lr: torch.optim.NAdam(ps, lr=lr), "exp_avg", "exp_avg_sq"),
    "radam": (lambda ps, lr: torch.optim.RAdam(ps, lr=lr), "exp_avg", "exp_avg_sq"),
    "adamax": (lambda ps, lr: torch.optim.Adamax(ps, lr=lr), "exp_avg", "exp_inf"),
    "lion": (lambda ps, lr: Lion(ps, lr=lr), "exp_avg", ""),
    "rmsprop": (lambda ps, lr: torch.optim.RMSprop(ps, lr=lr), "", "square_avg"),
    "adagrad": (lambda ps, lr: torch.optim.Adagrad(ps, lr=lr), "", "sum"),
    "adafactor": (lambda ps, lr: torch.optim.Adafactor(ps, lr=lr), "", "row_var"),
}


@pytest.mark.parametrize(("make", "first", "second"), OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("kind", ["linear", "grouped", "tucker"])
class TestOthers:
    def test_dense_to_factors(self, kind, make, first, second):
        net, module = one_site(kind)
        gradients = history(module.shape)
        optimizer = make(net.parameters(), 0.0)
        feed(optimizer, [module.weight], [[g] for g in gradients[:-1]])
        dr.enter_(net, dr.Phase.LOW, optimizer)
        mapped = [in_factors(module, g) for g in gradients]
        replay = [nn.Parameter(f.detach().clone()) for f in module.factors]
        reference = make(replay, 0.0)
        feed(reference, replay, mapped[:-1])
        self.compare(optimizer, list(module.factors), reference, replay, first, second)
        freeze(optimizer, 0.01)
        feed(optimizer, list(module.factors), mapped[-1:])
        assert all(bool(torch.isfinite(factor).all()) for factor in module.factors)

    def test_factors_to_dense(self, kind, make, first, second):
        net, module = one_site(kind, rank=1.0)
        optimizer = make(net.parameters(), 0.0)
        dr.enter_(net, dr.Phase.LOW, optimizer)
        gradients = history(module.shape)
        factors = [f.detach().clone() for f in module.factors]
        feed(optimizer, list(module.factors), [in_factors(module, g) for g in gradients[:-1]])
        dr.enter_(net, dr.Phase.FULL, optimizer)
        replay, shown = (nn.Parameter(module.weight.detach().clone()) for _ in range(2))
        reference = make([replay, shown], 0.0)
        feed(reference, [replay, shown], [[g, visible(module, factors, g)] for g in gradients[:-1]])
        if first:
            reference.state[replay][first] = reference.state[shown][first]
        self.compare(optimizer, [module.weight], reference, [replay], first, second)
        freeze(optimizer, 0.01)
        feed(optimizer, [module.weight], [[gradients[-1]]])
        assert bool(torch.isfinite(module.weight).all())

    def compare(self, optimizer, parameters, reference, replay, first, second):
        for got, expected in zip(parameters, replay, strict=True):
            mine, theirs = optimizer.state[got], reference.state[expected]
            assert mine.keys() == theirs.keys()
            for name, value in mine.items():
                assert value.shape == theirs[name].shape
                if name in ("step", "mu_product"):
                    torch.testing.assert_close(value, theirs[name])
            if first:
                torch.testing.assert_close(mine[first], theirs[first], rtol=1e-3, atol=1e-4)
            if second:
                power = 2 if second == "exp_inf" else 1
                ratio = (mine[second].pow(power).sum() / theirs[second].pow(power).sum()).sqrt()
                assert 0.4 < ratio < 2.5


@pytest.mark.parametrize("make", [torch.optim.Adafactor, torch.optim.NAdam])
def test_sites_that_share_a_factor_carry_theirs_stacked(make):
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 16, bias=False), nn.Linear(16, 12, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x)[:, :12] * self.b(x)

    torch.manual_seed(0)
    net = dr.transform(Pair(), (torch.randn(2, 16),), rank=dr.Fixed(3), share_inputs=True)
    optimizer = make(net.parameters())
    for phase in (dr.Phase.LOW, dr.Phase.FULL, dr.Phase.LOW):
        net(torch.randn(4, 16)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        fresh = {p: {name: value.shape for name, value in state.items()} for p, state in optimizer.state.items()}
        assert len(fresh) == len(list(net.parameters()))
        dr.enter_(net, phase, optimizer)
        assert len(optimizer.state) == len(list(net.parameters()))


@pytest.mark.parametrize(
    ("name", "make"),
    {
        "Adadelta": torch.optim.Adadelta,
        "ASGD": torch.optim.ASGD,
        "RMSprop": lambda ps: torch.optim.RMSprop(ps, momentum=0.9),
    }.items(),
)
def test_other_optimizers_are_reset_with_one_warning_that_names_them(name, make):
    net, module = one_site("linear")
    bias = nn.Parameter(torch.zeros(3))
    optimizer = make([{"params": net.parameters()}, {"params": [bias]}])
    bias.grad = torch.ones(3)
    module.weight.grad = torch.ones_like(module.weight)
    optimizer.step()
    optimizer.zero_grad()
    kept = optimizer.state.get(bias)
    with pytest.warns(dr.DynrankWarning, match=name) as caught:
        transition = dr.enter_(net, dr.Phase.LOW, optimizer)
    assert len(caught) == 1
    assert transition.carry is dr.Carry.RESET
    assert all(not optimizer.state.get(factor) for factor in module.factors)
    assert optimizer.state.get(bias) is kept


def test_lbfgs_keeps_one_history_over_all_parameters_and_is_refused():
    net, _ = one_site("linear")
    with pytest.raises(dr.TransitionError, match="LBFGS"):
        dr.enter_(net, dr.Phase.LOW, torch.optim.LBFGS(net.parameters()))
    assert set(dr.phases_of(net).values()) == {dr.Phase.FULL}


def test_reset_on_request_drops_moments_and_step_without_a_warning():
    net, module = one_site("linear")
    optimizer = torch.optim.AdamW(net.parameters())
    feed(optimizer, [module.weight], [[g] for g in history(module.shape)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        transition = dr.enter_(net, dr.Phase.LOW, optimizer, carry=dr.Carry.RESET)
    assert transition.carry is dr.Carry.RESET
    assert not optimizer.state
    feed(optimizer, list(module.factors), [in_factors(module, history(module.shape)[0])])
    assert all(float(optimizer.state[f]["step"]) == 1 for f in module.factors)


def test_an_optimizer_that_has_not_stepped_carries_nothing():
    net, module = one_site("linear")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    dr.enter_(net, dr.Phase.LOW, optimizer)
    assert not any(optimizer.state.values())
    feed(optimizer, list(module.factors), [in_factors(module, history(module.shape)[0])])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_state_is_carried_in_the_dtype_of_the_parameters(dtype):
    torch.manual_seed(0)
    net = dr.transform(
        nn.Sequential(nn.Linear(12, 8).to(dtype)), (torch.randn(2, 12, dtype=dtype),), allow_unprofitable=True
    )
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for phase in (dr.Phase.LOW, dr.Phase.FULL):
        for parameter in net.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
        dr.enter_(net, phase, optimizer)
        for parameter in net.parameters():
            assert optimizer.state[parameter]["momentum_buffer"].dtype is dtype
            assert parameter.dtype is dtype
