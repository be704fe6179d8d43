"""The schedule that decides by what it measures: its rules one by one, and in a run with a resume in it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, lr_scheduler

import dynrank_fx as dr
from dynrank_fx.lrplan import planned_rates
from dynrank_fx.phase import Decision, SiteState

FULL, LOW = dr.Phase.FULL, dr.Phase.LOW
FLAT = (1.0,) * 8
STEEP = (1.0, 0.5, 1e-3, 1e-3, 0.0, 0.0, 0.0, 0.0)


def state(epoch: int = 0, *, phases: str = "FF", spectra=(FLAT, FLAT), spent: float = 0.0, lrs=(1.0,) * 10):
    """Two sites of rank 2 that take 0.4 of a dense step each, and 0.1 in LOW: LOW takes 0.4 in all."""
    names = {"F": FULL, "L": LOW}
    sites = {f"s{i}": SiteState(names[phase], 2, 0.4, 0.1) for i, phase in enumerate(phases)}
    return dr.TrainState(epoch, 10, lrs[epoch], {f"s{i}": s for i, s in enumerate(spectra)}, spent, lrs, sites)


def letters(decision: Decision) -> str:
    return "".join(phase.name[0] for phase in decision.values())


def test_it_starts_full_and_says_why():
    decision = dr.schedules.auto(0.7)(state())
    assert letters(decision) == "FF"
    assert decision.reasons == (
        "FULL for 2 of 2 sites: 3.00 dense epochs of compute are left above LOW, and 100% of the learning rate",
    )


def test_another_budget_another_end_of_full():
    def epochs_of_full(cost: float) -> float:
        schedule, spent, phases, count = dr.schedules.auto(cost, recovery=0.0), 0.0, "FF", 0.0
        for epoch in range(10):
            phases = letters(schedule(state(epoch, phases=phases, spent=spent)))
            count += phases.count("F") / 2
            spent += 0.4 + 0.3 * phases.count("F")
        assert spent <= 10 * cost + 1e-9
        return count

    # Above LOW's 0.4 there are cost - 0.4 of ten epochs, at 0.6 for each epoch of FULL.
    assert [epochs_of_full(cost) for cost in (0.4, 0.5, 0.65, 0.7, 0.76, 1.0)] == [0, 1.5, 4, 5, 6, 10]


def test_what_is_left_of_the_budget_goes_to_the_site_that_would_lose_most():
    middle = (1.0, 0.9, 0.8, 0.1, 0.1, 0.1, 0.1, 0.1)
    for spectra, expected in (((FLAT, middle), "FL"), ((middle, FLAT), "LF")):
        decision = dr.schedules.auto(0.43)(state(spectra=spectra))
        assert letters(decision) == expected
        assert "cut the others: the budget of 0.43 of dense training is used up" in decision.reasons


def test_other_spectra_a_site_that_fits_its_rank_is_cut_at_once():
    decision = dr.schedules.auto(0.9)(state(3, spectra=(FLAT, STEEP), spent=3.0))
    assert letters(decision) == "FL"
    assert "cut s1: beyond rank 2 is 0.0% of its energy" in decision.reasons
    assert letters(dr.schedules.auto(0.9, tail=0.0)(state(3, spectra=(FLAT, STEEP), spent=3.0))) == "FF"


def test_another_learning_rate_another_time_of_the_cut():
    cosine = tuple(1 + torch.cos(torch.arange(10) / 10 * torch.pi).double().numpy())
    steps = (1.0,) * 5 + (0.1,) * 5

    def first_cut(lrs) -> int:
        schedule = dr.schedules.auto(1.0, recovery=0.25)
        return next(e for e in range(10) if letters(schedule(state(e, spent=float(e), lrs=lrs))) == "LL")

    assert first_cut((1.0,) * 10) == 8, "0.2 are left"
    assert first_cut(tuple(map(float, cosine))) == 5
    assert first_cut(steps) == 5, "0.09 are left"
    assert first_cut(tuple(reversed(steps))) == 9
    said = dr.schedules.auto(1.0)(state(5, spent=5.0, lrs=steps)).reasons
    assert said == ("cut: 9% of the learning rate is left, which LOW needs to recover",)


def test_what_is_cut_stays_cut():
    assert letters(dr.schedules.auto(1.0)(state(4, phases="LF", spent=2.0))) == "LF"
    decision = dr.schedules.auto(1.0)(state(4, phases="LL", spent=1.6))
    assert letters(decision) == "LL"
    assert decision.reasons == ("LOW: every site is cut",)


def test_it_is_pure_and_comparable_and_refuses_what_is_no_share():
    auto = dr.schedules.auto(0.6)
    first = auto(state(2, spent=2.0))
    auto(state(9, phases="LL", spent=9.0))
    assert auto(state(2, spent=2.0)) == first
    assert auto == dr.schedules.auto(0.6) != dr.schedules.auto(0.7)
    assert repr(auto) == "Auto(cost=0.6, recovery=0.25, tail=0.01)"
    with pytest.raises(dr.ScheduleError, match=r"auto's cost is a share, from 0 to 1, not 70"):
        dr.schedules.auto(70)
    with pytest.raises(dr.ScheduleError, match=r"auto needs the number of epochs.*train_state"):
        auto(dr.TrainState(3))


# What it is told


def a_net() -> nn.Module:
    torch.manual_seed(0)
    return dr.transform(nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32)), (torch.randn(4, 32),))


def test_the_state_of_a_net():
    net = a_net()
    optimizer = SGD(net.parameters(), lr=0.1)
    scheduler = lr_scheduler.MultiStepLR(optimizer, [2, 3])
    dr.enter_(net, {"0.weight": LOW})
    found = dr.train_state(net, optimizer, 1, 4, scheduler, rates=[0.2], spent=1.0)
    assert found.lrs == pytest.approx((0.2, 0.1, 0.1, 0.01))
    assert {name: site.phase for name, site in found.sites.items()} == {"0.weight": LOW, "2.weight": FULL}
    assert found.sites["0.weight"] == SiteState(LOW, 8, 0.5, 0.25)
    expected = torch.linalg.svdvals(net.get_submodule("2").weight.detach().double())
    torch.testing.assert_close(torch.tensor(found.spectra["2.weight"], dtype=torch.float64), expected)


SCHEDULERS = {
    "none": lambda o: None,
    "steps": lambda o: lr_scheduler.MultiStepLR(o, [2, 4]),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 6),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.5**epoch),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.3, total_steps=7),
    "warm-up, then cosine": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=2), lr_scheduler.CosineAnnealingLR(o, 4)], [2]
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("make", [lambda p: SGD(p, lr=0.1, momentum=0.9), lambda p: AdamW(p, lr=0.1)])
def test_planned_rates_are_those_that_come(name, make):
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = make([parameter])
    scheduler = SCHEDULERS[name](optimizer)
    plans, came = [], []
    for epoch in range(6):
        plans.append(planned_rates(optimizer, scheduler, 6 - epoch))
        came.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    for epoch, plan in enumerate(plans):
        assert plan == pytest.approx(came[epoch:])


def test_rates_that_nobody_knows_yet_are_left_out():
    optimizer = SGD([nn.Parameter(torch.zeros(3))], lr=0.1)
    assert planned_rates(optimizer, lr_scheduler.ReduceLROnPlateau(optimizer), 5) == ()
    net = a_net()
    optimizer = SGD(net.parameters(), lr=0.1)
    found = dr.train_state(net, optimizer, 0, 4, lr_scheduler.ReduceLROnPlateau(optimizer))
    assert found.lrs == ()
    assert set(dr.schedules.auto()(found).values()) == {FULL}
