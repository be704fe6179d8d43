"""The soft landing: what a cut takes away is gone by then, by exactly what the formula says on the way."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import dynrank_fx as dr
from dynrank_fx.rewrite import switched_modules
from dynrank_fx.schedules import SiteState
from dynrank_fx.training.landing import Landing, epochs_to_cut
from dynrank_fx.training.starts import Starts

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
    pack = next(row.sharing for row in dr.plan_of(net).sites if row.sharing)
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


# Tucker and CP

BOTH = pytest.mark.parametrize("layout", [dr.TuckerLayout, dr.CPLayout], ids=lambda layout: layout.name)


def convolutions(layout: type, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    """More output than input channels and fewer, and one in channels_last."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(6, 12, 3), nn.Tanh(), nn.Conv2d(12, 8, 3), nn.Tanh(), nn.Conv2d(8, 8, (3, 2)))
    model[2].to(memory_format=torch.channels_last)
    x = torch.randn(3, 6, 9, 9, dtype=dtype)
    net = dr.transform(model.to(dtype), (x,), rank=dr.Fixed(4), conv_layout=layout, allow_unprofitable=True)
    return net, x


def far_from_a_cut(net: nn.Module, start: dict[str, Tensor]) -> dict[str, float]:
    """‖W − what the cut keeps of the weight it started from‖, by site."""
    found = {}
    for name, (site, *_) in switched_modules(net).items():
        kept = site.layout.join(site.layout.split(start[name], site.rank))
        found[name] = float((site.weight.detach() - kept).norm())
    return found


@BOTH
@pytest.mark.parametrize("steps", [1, 5, 23])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_of_tucker_and_cp_the_cut_changes_nothing_either(layout, steps, dtype):
    net, x = convolutions(layout, dtype)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    landing = Landing(net, optimizer)
    landing.begin(dict.fromkeys(switched_modules(net), steps))
    for _ in range(steps):
        step(net, x, optimizer)
    dense = {name: site.weight.detach().double() for name, (site, *_) in switched_modules(net).items()}
    before = net.eval()(x)
    assert min(change.error for change in dr.enter_(convolutions(layout)[0], LOW).changes) > 0.2
    dr.enter_(net, LOW, optimizer, split=Starts(landing).split)
    small = 1e-10 if dtype is torch.float64 else 1e-5
    for name, (site, *_) in switched_modules(net).items():
        left = (site.layout.join(tuple(factor.detach().double() for factor in site.factors)) - dense[name]).norm()
        assert left < small * dense[name].norm()
    torch.testing.assert_close(net(x), before, rtol=small, atol=small)


@BOTH
def test_of_tucker_and_cp_it_falls_by_what_the_formula_says(layout):
    """With steps of no length, but that the kept part is followed a little further each time."""
    net, x = convolutions(layout)
    start = {name: site.weight.detach().clone() for name, (site, *_) in switched_modules(net).items()}
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    Landing(net, optimizer, every=2).begin(dict.fromkeys(start, 8))
    first = far_from_a_cut(net, start)
    for done in range(1, 9):
        step(net, x, optimizer)
        for name, far in far_from_a_cut(net, start).items():
            assert far == pytest.approx((1 - (done // 2) / 4) * first[name], rel=0.02, abs=0.05 * first[name])


@BOTH
def test_of_tucker_and_cp_a_landing_goes_on_from_its_state_and_with_another_rank(layout):
    net, x = convolutions(layout)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    landing = Landing(net, optimizer, every=1)
    landing.begin(dict.fromkeys(switched_modules(net), 9))
    for _ in range(3):
        step(net, x, optimizer)
    dr.replan_(net, dr.plan_of(net).with_ranks({"0.weight": 2}), optimizer)
    step(net, x, optimizer)
    twin, twins = copy.deepcopy((net, optimizer))
    state = copy.deepcopy(landing.state())
    resumed = Landing(twin, twins, every=1)
    resumed.load(state)
    for one, its in ((net, optimizer), (twin, twins)):
        for _ in range(5):
            step(one, x, its)
    for mine, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert switched_modules(net)["2.weight"][0].weight.is_contiguous(memory_format=torch.channels_last)
    transition = dr.enter_(net, LOW, optimizer, split=Starts(landing).split)
    assert max(change.error for change in transition.changes) < 1e-10


# How far away the cut is


def ahead(schedule, epoch: int = 0, epochs: int = 6, phase: dr.Phase = FULL) -> int | None:
    """Of a site of two, the other being in LOW."""
    sites = {name: SiteState(FULL, rank=2, dense=0.4, low=0.1) for name in ("s0", "s1")}
    spectra = dict.fromkeys(sites, (1.0,) * 8)
    start = dr.TrainState(epoch, epochs, 0.1, spectra, float(epoch), (0.1,) * epochs, sites)
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


@pytest.mark.parametrize("layout", [dr.ChannelLayout, dr.TuckerLayout, dr.CPLayout], ids=lambda layout: layout.name)
def test_a_run_lands_before_every_cut_and_says_how_far_it_is(layout):
    from dynrank_fx.training import Run, Settings, Task, fit

    net, x = made(torch.float32) if layout is dr.ChannelLayout else convolutions(layout, torch.float32)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    task = Task([x] * 7, lambda output, batch: output.square().mean(), lambda batch: ((batch,), {}))
    run = Run(net, optimizer, dr.schedules.interleave(low=1, full=2))
    fit(run, task, Settings(7, compile=False, landing=True))
    ahead = [set(record.epochs_to_cut.values()) for record in run.history]
    assert ahead == [set(), {2}, {1}, set(), {2}, {1}, set()]
    for record in run.history:
        if record.switch_error and record.phase == "LOW" and record.epoch:
            assert max(record.switch_error.values()) < 1e-4
    assert sum(bool(record.switch_error) for record in run.history) == 5
