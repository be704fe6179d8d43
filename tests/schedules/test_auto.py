"""The schedule that decides by what it measures: its rules one by one, and in a run with a resume in it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, lr_scheduler

import dynrank_fx as dr
from dynrank_fx.layouts import effective_rank
from dynrank_fx.schedules import Decision, Schedule, SiteState
from dynrank_fx.schedules.auto import _Seen
from dynrank_fx.training import Run, Settings, Task, fit, read_run, restore_run_, save_run

FULL, LOW = dr.Phase.FULL, dr.Phase.LOW
FLAT = (1.0,) * 8
STEEP = (1.0, 0.5, 1e-3, 1e-3, 0.0, 0.0, 0.0, 0.0)


def state(epoch: int = 0, *, phases: str = "FF", spectra=(FLAT, FLAT), spent: float = 0.0, lrs=(1.0,) * 10):
    """Two sites of rank 2 that take 0.4 of a dense step each, and 0.1 in LOW: LOW takes 0.4 in all."""
    names = {"F": FULL, "L": LOW}
    sites = {f"s{i}": SiteState(names[phase], 2, 0.4, 0.1) for i, phase in enumerate(phases)}
    return dr.TrainState(epoch, 10, lrs[epoch], {f"s{i}": s for i, s in enumerate(spectra)}, spent, lrs, sites)


def letters(decision: Decision) -> str:
    return "".join(phase.name[0] for phase in decision.phases.values())


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
    assert repr(auto) == "Auto(cost=0.6, recovery=0.25, tail=0.01, collapse=0.5, reserve=0.0)"
    with pytest.raises(dr.ScheduleError, match=r"auto's cost is a share, from 0 to 1, not 70"):
        dr.schedules.auto(70)
    with pytest.raises(dr.ScheduleError, match=r"auto needs the number of epochs.*train_state"):
        auto(dr.TrainState(3))


# Inflating again

STEEPEST = (1.0, 1e-2) + (0.0,) * 6
"""An effective rank of 1.06 of 2 (53 %) at a rank of 2, and of 1.06 of 4 (26 %) at a rank of 4."""


def four(epoch: int, phases: str, spectra, *, spent: float, lrs=(1.0,) * 10, rank: int = 4) -> dr.TrainState:
    """Four sites of 8x8 that take 0.2 of a dense step each, and half of that in LOW: LOW takes 0.6 in all."""
    sites = {f"s{i}": SiteState(FULL if phase == "F" else LOW, rank, 0.2, 0.1) for i, phase in enumerate(phases)}
    return dr.TrainState(epoch, 10, lrs[epoch], {f"s{i}": s for i, s in enumerate(spectra)}, spent, lrs, sites)


def test_a_site_whose_rank_has_collapsed_is_inflated_again_and_no_healthy_one():
    auto = dr.schedules.auto(0.8)
    decision = auto(four(4, "LLLL", (FLAT, STEEPEST, FLAT, FLAT), spent=3.0))
    assert letters(decision) == "LFLL"
    assert decision.reasons == (
        "inflate s1: its effective rank is 1.1 of 4, 26%",
        "FULL for 1 of 4 sites: 1.40 dense epochs of compute are left above LOW, and 60% of the learning rate",
    )
    healthy = auto(four(4, "LLLL", (FLAT,) * 4, spent=3.0))
    assert letters(healthy) == "LLLL"
    assert healthy.reasons == ("LOW: every site is cut",)
    assert letters(auto(four(4, "LLLL", (FLAT, STEEPEST, FLAT, FLAT), spent=3.0, rank=2))) == "LLLL", "53 % of its rank"
    deeper = dr.schedules.auto(0.8, collapse=0.6)
    assert letters(deeper(four(4, "LLLL", (FLAT, STEEPEST, FLAT, FLAT), spent=3.0, rank=2))) == "LFLL"
    assert letters(dr.schedules.auto(0.8, collapse=0.0)(four(4, "LLLL", (STEEPEST,) * 4, spent=3.0))) == "LLLL"


def test_a_weight_of_zeros_has_collapsed_and_is_not_cut_for_fitting_its_rank():
    zeros = (0.0,) * 8
    decision = dr.schedules.auto(0.8)(four(0, "FFFF", (zeros, FLAT, FLAT, FLAT), spent=0.0))
    assert letters(decision) == "FFFF"
    assert decision.reasons[0] == "keep s0 FULL: its effective rank is 0.0 of 4, 0%"


def test_the_most_collapsed_site_is_inflated_first_as_far_as_the_budget_goes():
    spectra = (FLAT, STEEPEST, (1.0, 1e-4) + (0.0,) * 6, FLAT)
    decisions = {cost: dr.schedules.auto(cost)(four(4, "LLLL", spectra, spent=2.4)) for cost in (0.6, 0.61, 0.62)}
    assert {cost: letters(decision) for cost, decision in decisions.items()} == {
        0.6: "LLLL",
        0.61: "LLFL",
        0.62: "LFFL",
    }
    said = "the budget of 0.61 of dense training does not pay to inflate s1: its effective rank is 1.1 of 4, 26%"
    assert decisions[0.61].reasons[1] == said


def test_a_site_is_inflated_only_while_the_learning_rate_lets_it_recover_from_the_next_cut():
    spectra, early = (STEEPEST, FLAT, FLAT, FLAT), (1.0,) * 3 + (0.1,) * 7
    auto = dr.schedules.auto(0.8)
    assert letters(auto(four(4, "LLLL", spectra, spent=3.0))) == "FLLL"
    assert letters(auto(four(4, "LLLL", spectra, spent=3.0, lrs=early))) == "LLLL"
    assert letters(auto(four(8, "LLLL", spectra, spent=5.0))) == "LLLL"
    assert letters(auto(four(8, "FLLL", spectra, spent=5.0))) == "LLLL"


def test_an_inflated_site_stays_full_until_its_rank_is_back_and_does_not_flap():
    def of(share: float) -> tuple[float, ...]:
        """A spectrum of nothing beyond rank 4, whose effective rank is about this share of it."""
        low, high = 0.0, 1.0
        for _ in range(50):
            middle = (low + high) / 2
            p = [v / (1 + 3 * middle) for v in (1.0, middle, middle, middle)]
            value = torch.exp(-sum(torch.tensor(v) * torch.tensor(v).log() for v in p if v > 0)) / 4
            low, high = (middle, high) if float(value) < share else (low, middle)
        return (1.0, low, low, low, 0.0, 0.0, 0.0, 0.0)

    auto = dr.schedules.auto(1.0)
    for share, in_low, in_full in ((0.45, "F", "F"), (0.55, "L", "F"), (0.7, "L", "F"), (0.72, "L", "L")):
        spectra = (of(share), FLAT, FLAT, FLAT)
        assert letters(auto(four(4, "LLLL", spectra, spent=3.0)))[0] == in_low
        assert letters(auto(four(4, "FLLL", spectra, spent=3.0)))[0] == in_full


def test_what_was_begun_goes_on_where_the_budget_pays_for_one():
    worse = (1.0, 1e-4) + (0.0,) * 6
    assert letters(dr.schedules.auto(0.61)(four(4, "LFLL", (FLAT, STEEPEST, worse, FLAT), spent=2.4))) == "LFLL"


def simulated(schedule, spectra_at, epochs: int = 10) -> tuple[list[str], float, list[Decision]]:
    """The phases of every epoch, what was spent, and the decisions. spectra_at: by epoch and phases."""
    phases, spent, shown, decisions = "FFFF", 0.0, [], []
    for epoch in range(epochs):
        decisions.append(schedule(four(epoch, phases, spectra_at(epoch, phases), spent=spent)))
        phases = letters(decisions[-1])
        shown.append(phases)
        spent += 0.6 + 0.1 * phases.count("F")
    return shown, spent, decisions


@pytest.mark.parametrize("reserve", [0.0, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("cost", [0.6, 0.65, 0.7, 0.75, 0.83, 1.0])
def test_no_run_exceeds_the_budget_and_none_of_what_is_held_back_is_lost(cost: float, reserve: float):
    def healthy(epoch: int, phases: str):
        return tuple((1.0,) * 4 + (0.5 + i / 10,) * 4 for i in range(4))

    def collapsing(epoch: int, phases: str):
        return tuple(FLAT if phase == "F" and epoch < 3 else STEEPEST for phase in phases)

    def random(epoch: int, phases: str):
        generator = torch.Generator().manual_seed(epoch)
        values = torch.rand(4, 8, generator=generator) ** torch.randint(1, 40, (4, 1), generator=generator)
        return tuple(tuple(row.sort(descending=True).values.tolist()) for row in values)

    schedule = dr.schedules.auto(cost, reserve=reserve)
    for spectra_at in (healthy, collapsing, random):
        shown, spent, decisions = simulated(schedule, spectra_at)
        assert spent <= 10 * cost + 1e-9
        assert set(shown[8:]) == {"LLLL"}, "0.2 of the learning rate are left"
        assert all(decision.reasons for decision in decisions)
        assert simulated(schedule, spectra_at) == (shown, spent, decisions)
    spent = simulated(schedule, healthy)[1]
    assert spent == pytest.approx(simulated(dr.schedules.auto(cost), healthy)[1]), "as without holding any back"


def test_what_is_held_back_leaves_sites_in_low_and_pays_for_the_one_that_collapses():
    falling = [(1.0,) * 4 + (0.5 - i / 10,) * 4 for i in range(4)]

    def spectra_at(epoch: int, phases: str):
        return (*falling[:3], STEEPEST if 4 <= epoch < 6 else falling[3])

    assert simulated(dr.schedules.auto(0.75), spectra_at)[0] == ["FFFF"] * 3 + ["FFFL"] + ["LLLL"] * 6
    shown, _, decisions = simulated(dr.schedules.auto(0.75, reserve=0.6), spectra_at)
    assert shown == ["FFFF", "FFLL", "FFLL", "FFLL", "FFLF", "FLLF", "LLLL", "LLLL", "LLLL", "LLLL"]
    assert decisions[1].reasons[-1] == "cut the others: 0.90 dense epochs are held back for sites that may collapse"
    assert decisions[4].reasons[0] == "inflate s3: its effective rank is 1.1 of 4, 26%"
    assert decisions[5].reasons[0] == "keep s3 FULL: its effective rank is 1.1 of 4, 26%"


def test_sites_that_share_a_factor_go_together():
    def told(phases: str, spectra, spent: float) -> dr.TrainState:
        found = four(4, phases, spectra, spent=spent)
        sharing = ("s0", "s2")
        sites = {name: replace(site, sharing=sharing if name in sharing else ()) for name, site in found.sites.items()}
        return replace(found, sites=sites)

    fits = (1.0,) * 4 + (1e-2,) * 4
    auto = dr.schedules.auto(0.8)
    inflated = auto(told("LLLL", (FLAT, FLAT, STEEPEST, FLAT), 3.0))
    assert letters(inflated) == "FLFL"
    assert inflated.reasons[0] == "inflate s2: its effective rank is 1.1 of 4, 26%"
    assert inflated.reasons[1].startswith("FULL for 2 of 4 sites")
    assert letters(auto(told("FFFF", (fits, fits, FLAT, FLAT), 3.0))) == "FLFF", "s0 would fit"
    assert letters(auto(told("FFFF", (fits, fits, fits, FLAT), 3.0))) == "LLLF"
    assert letters(dr.schedules.auto(0.61)(told("LLLL", (FLAT, FLAT, STEEPEST, FLAT), 2.4))) == "LLLL", "pays for one"


# In a run


def a_collapsing_run(schedule: Schedule) -> tuple[Run, Task, Settings]:
    """Two linears that learn a map of rank one, once the learning rate is up; decay takes what it does not need."""
    torch.manual_seed(0)
    net = dr.transform(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)), (torch.randn(4, 32),))
    x = torch.randn(64, 32)
    y = x[:, :1] * torch.linspace(-1, 1, 32)
    optimizer = AdamW(net.parameters(), lr=0.02, weight_decay=0.5)
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0 if epoch else 1e-3)
    task = Task([(x, y)] * 20, lambda output, batch: (output - batch[1]).square().mean(), lambda b: ((b[0],), {}))
    return Run(net, optimizer, schedule, scheduler), task, Settings(8, compile=False, landing=True)


def test_a_run_inflates_again_lands_before_the_next_cut_and_survives_a_resume(tmp_path):
    schedule = dr.schedules.auto(0.75, reserve=0.8)
    run, task, settings = a_collapsing_run(schedule)
    assert fit(run, task, settings)
    phases = ["".join(phase.name[0] for phase in record.phases.values()) for record in run.history]
    assert phases == ["FF", "FL", "FF", "FF", "LF", "LL", "LL", "LL"]
    inflated = run.history[2]
    assert inflated.reasons[0].startswith("inflate 1.weight: its effective rank is 3.9 of 8, 49%")
    assert inflated.epochs_to_cut == {"0.weight": 2, "1.weight": 3}
    assert run.history[5].switch_error["1.weight"] < 1e-2
    assert run.history[-1].spent <= 0.75 * 8

    for stop in (25, 45, 60, 90):  # in LOW, inflated, at the end of an epoch, before the cut
        stopped, task, settings = a_collapsing_run(schedule)
        steps = iter(range(1, 1000))
        assert not fit(stopped, task, settings, should_stop=lambda steps=steps, stop=stop: next(steps) == stop)
        save_run(stopped, tmp_path)
        resumed, task, settings = a_collapsing_run(schedule)
        restore_run_(resumed, *read_run(tmp_path))
        assert fit(resumed, task, settings)
        for record, expected in zip(resumed.history, run.history, strict=True):
            for what in ("phases", "reasons", "epochs_to_cut", "spent", "effective_rank", "loss"):
                assert record[what] == expected[what]
        for name, tensor in run.net.state_dict().items():
            assert torch.equal(tensor, resumed.net.state_dict()[name])


# What it is told


def a_net() -> nn.Module:
    torch.manual_seed(0)
    return dr.transform(nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32)), (torch.randn(4, 32),))


def test_a_run_with_shared_factors_keeps_them_together():
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.out = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.q(x) * self.k(x))

    torch.manual_seed(0)
    net = dr.transform(Pair(), (torch.randn(4, 32),), share_inputs=True)
    optimizer = SGD(net.parameters(), lr=0.1)
    schedule, seen = dr.schedules.auto(0.6, reserve=0.5), set()
    phases = dr.Phases(net, optimizer, schedule, 8)
    for epoch in range(8):
        record = phases.begin(epoch)
        assert record.phases["q.weight"] == record.phases["k.weight"]
        seen.add(tuple(record.phases.values()))
    assert record.spent <= 0.6 * 8
    assert len(seen) > 2, "FULL, LOW and mixed"


def test_a_site_in_groups_is_measured_over_all_of_them():
    torch.manual_seed(0)
    for layer, x in (
        (nn.Conv2d(32, 32, 3, groups=2), torch.randn(2, 32, 5, 5)),
        (nn.Linear(32, 32), torch.randn(2, 32)),
    ):
        net = dr.transform(nn.Sequential(layer), (x,), rank=dr.Fixed(4))
        dr.enter_(net, LOW)
        found = dr.train_state(net, SGD(net.parameters(), lr=0.1), 3, 8)
        groups = getattr(layer, "groups", 1)
        assert found.sites["0.weight"].groups == groups
        assert len(found.spectra["0.weight"]) == 4 * groups
        seen = _Seen.of(found.spectra["0.weight"], found.sites["0.weight"])
        expected = effective_rank(net.get_submodule("0").spectrum())
        assert (seen.count, seen.tail) == (4 * groups, 0.0)
        assert seen.effective == pytest.approx(expected)
