"""The soft landing: what a cut takes away is gone by then, by exactly what the formula says on the way."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import dynrank_fx as dr
from dynrank_fx.landing import Landing, epochs_to_cut
from dynrank_fx.switched import switched_modules

FULL, LOW, ADAPTOR = dr.Phase.FULL, dr.Phase.LOW, dr.Phase.ADAPTOR


class Layers(nn.Module):
    """A tall, a wide and a grouped weight, and two that read the same input."""

    def __init__(self) -> None:
        super().__init__()
        self.tall, self.wide = nn.Linear(12, 20), nn.Linear(20, 12)
        self.conv = nn.Conv1d(12, 12, 3, padding=1, groups=2)
        self.a, self.b = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.wide(torch.tanh(self.tall(x))).mT).mT
        return self.a(x) * self.b(x)


def made(dtype: torch.dtype = torch.float64, share: bool = False) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(6, 5, 12, dtype=dtype)
    net = dr.transform(
        Layers().to(dtype), (x,), rank=dr.Fixed(3), allow_unprofitable=True, share_inputs=share, multiple_of=1
    )
    return net, x


def step(net: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer) -> None:
    net(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def tails(net: nn.Module) -> dict[str, float]:
    """The share of each weight's norm beyond its rank."""
    found = {}
    for name, (module, *_) in switched_modules(net).items():
        s = module.spectrum()
        found[name] = float(s[..., module.rank :].norm() / s.norm())
    return found


@pytest.mark.parametrize("steps", [1, 4, 5, 23])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_at_the_cut_nothing_is_left_beyond_the_rank_so_that_it_changes_nothing(steps, dtype):
    net, x = made(dtype)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    landing = Landing(net, optimizer)
    landing.begin(dict.fromkeys(switched_modules(net), steps))
    assert min(tails(net).values()) > 0.2
    for _ in range(steps):
        step(net, x, optimizer)
    small = 1e-12 if dtype is torch.float64 else 1e-5
    assert max(tails(net).values()) < small
    before = net.eval()(x)
    transition = dr.enter_(net, LOW, optimizer)
    assert max(change.error for change in transition.changes) < max(small, 1e-6)
    torch.testing.assert_close(net(x), before, rtol=1e-4, atol=1e-5)


def test_on_the_way_it_falls_by_what_the_formula_says():
    """With steps of no length: after each application, what is beyond the rank is left to a known share."""
    net, x = made()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    first = {name: modules[0].spectrum() for name, modules in switched_modules(net).items()}
    Landing(net, optimizer, every=2).begin(dict.fromkeys(first, 8))
    for done in range(1, 9):
        step(net, x, optimizer)
        left = 1 - (done // 2) / 4
        for name, (module, *_) in switched_modules(net).items():
            expected = first[name].clone()
            expected[..., module.rank :] *= left
            torch.testing.assert_close(module.spectrum(), expected, rtol=1e-9, atol=1e-12)


def test_sites_that_share_a_factor_land_together():
    net, x = made(share=True)
    pack = next(row.pack for row in dr.plan_of(net).sites if row.pack)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    landing = Landing(net, optimizer)
    landing.begin(dict.fromkeys(switched_modules(net), 6))
    for _ in range(6):
        step(net, x, optimizer)
    stacked = torch.cat([switched_modules(net)[name][0].weight.detach() for name in pack])
    s = torch.linalg.svdvals(stacked)
    assert float(s[3:].norm() / s.norm()) < 1e-12


def test_what_is_not_to_be_cut_trains_as_it_would():
    net, x = made()
    twin = copy.deepcopy(net)
    optimizer, plain = (torch.optim.AdamW(each.parameters(), lr=1e-2) for each in (net, twin))
    landing = Landing(net, optimizer)
    landing.begin({})
    step(net, x, optimizer)
    step(twin, x, plain)
    for mine, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    landing.begin({"tall.weight": 1})
    landing.remove()
    step(net, x, optimizer)
    step(twin, x, plain)
    assert torch.equal(switched_modules(net)["tall.weight"][0].weight, switched_modules(twin)["tall.weight"][0].weight)


def test_other_ranks_and_layouts_of_memory():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Conv2d(16, 8, 1)).to(memory_format=torch.channels_last)
    x = torch.randn(2, 8, 6, 6)
    net = dr.transform(model, (x,), rank=dr.Fixed(4), allow_unprofitable=True)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-2)
    landing = Landing(net, optimizer, every=1)
    landing.begin({"0.weight": 9, "1.weight": 9})
    for i in range(9):
        if i == 4:
            dr.replan_(net, dr.plan_of(net).with_ranks({"0.weight": 2}), optimizer)
        step(net, x, optimizer)
    assert max(tails(net).values()) < 1e-5
    weight = switched_modules(net)["0.weight"][0].weight
    assert weight.is_contiguous(memory_format=torch.channels_last)


# How far away the cut is


def ahead(schedule, epoch: int = 0, epochs: int = 6, phase: dr.Phase = FULL) -> int | None:
    """Of a site of two, the other being in LOW."""
    from test_auto import state

    told = state(epoch)
    start = dr.TrainState(epoch, epochs, 0.1, told.spectra, float(epoch), (0.1,) * epochs, told.sites)
    return epochs_to_cut(schedule, start, {"s0": phase, "s1": LOW}).get("s0")


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (dr.schedules.warm_up(4), 4),
        (dr.schedules.always(FULL), None),
        (dr.schedules.FullBetween(0, 2, ADAPTOR), None),
        (dr.schedules.interleave(low=0, full=1), None),
        (dr.schedules.join([dr.schedules.always(FULL), dr.schedules.always(LOW)], [3]), 3),
        pytest.param(lambda state: {"s0": LOW} if state.epoch == 2 else {}, 2, id="one of the user's own"),
        pytest.param(lambda state: {"s*": LOW if state.epoch == 4 else FULL}, 4, id="by a pattern"),
        (dr.schedules.auto(1.0, recovery=0.51), 3),
        (dr.schedules.auto(0.5, recovery=0.0), 2),
    ],
    ids=str,
)
def test_the_schedule_is_asked_ahead(schedule, expected):
    assert ahead(schedule) == expected
    assert ahead(schedule, phase=LOW) is None


def test_a_run_lands_before_every_cut_and_says_how_far_it_is():
    from dynrank_fx.train import Run, Settings, Task, fit

    net, x = made(torch.float32)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    task = Task([x] * 7, lambda output, batch: output.square().mean(), lambda batch: ((batch,), {}))
    run = Run(net, optimizer, dr.schedules.interleave(low=1, full=2))
    fit(run, task, Settings(7, compile=False, landing=True))
    ahead = [set(record["epochs_to_cut"].values()) for record in run.history]
    assert ahead == [set(), {2}, {1}, set(), {2}, {1}, set()]
    for record in run.history:
        if record["switch_error"] and record["phase"] == "LOW" and record["epoch"]:
            assert max(record["switch_error"].values()) < 1e-4
