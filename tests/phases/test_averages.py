"""Averages of weights across switches, against a dense average of the net's weights in float64."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable

import pytest
import schemas  # noqa: F401 (torchvision, which timm imports, asks for its ops on a torch that has none)
import torch
from switching import Pair
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import dynrank_fx as dr
from dynrank_fx.rewrite import Switched, switched_modules

FULL, LOW, ADAPTOR = dr.Phase.FULL, dr.Phase.LOW, dr.Phase.ADAPTOR
DECAY = 0.95
LAYERS = {
    "linear": (lambda: nn.Linear(20, 16), (24, 20), dr.ChannelLayout),
    "channel": (lambda: nn.Conv2d(8, 12, 3), (6, 8, 5, 5), dr.ChannelLayout),
    "spatial": (lambda: nn.Conv2d(8, 12, 3), (6, 8, 5, 5), dr.SpatialLayout),
    "grouped": (lambda: nn.Conv2d(8, 12, 3, groups=2), (6, 8, 5, 5), dr.ChannelLayout),
    "tucker": (lambda: nn.Conv2d(8, 12, 3), (6, 8, 5, 5), dr.TuckerLayout),
    "cp": (lambda: nn.Conv2d(8, 12, 3), (6, 8, 5, 5), dr.CPLayout),
}


class Training:
    """One layer that learns to be another, and beside it a dense average of what it stands for."""

    def __init__(self, kind: str, average: Callable[[nn.Module], object], rank: float = 0.5) -> None:
        torch.manual_seed(0)
        make, shape, layout = LAYERS[kind]
        self.x, teacher = torch.randn(shape, dtype=torch.float64), make().double()
        self.y = teacher(self.x).detach()
        self.net = dr.transform(
            nn.Sequential(make().double()),
            (self.x,),
            rank=dr.Ratio(rank),
            conv_layout=layout,
            allow_unprofitable=True,
        )
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=3e-3)
        self.average = average(self.net)
        self.dense = self.site.weight.detach().clone()

    @property
    def site(self) -> Switched:
        return switched_modules(self.net)["0.weight"][0]

    @property
    def averaged(self) -> Tensor:
        return switched_modules(self.average)["0.weight"][0].weight.detach()

    @property
    def error(self) -> float:
        """Of the average, in parts of how far the dense average is from the net's weight itself."""
        lag = (self.dense - self.site.weight.detach()).norm()
        return float((self.averaged - self.dense).norm() / lag)

    def train(self, steps: int) -> None:
        for _ in range(steps):
            x = self.x + 0.3 * torch.randn_like(self.x)
            (self.net(x) - self.y).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.average.update_parameters(self.net)
            self.dense.lerp_(self.site.weight.detach(), 1 - DECAY)

    def enter(self, phase: dr.Phase) -> None:
        dr.enter_(self.net, phase, self.optimizer, averages=[self.average])


def ema(net: nn.Module) -> AveragedModel:
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    average.n_averaged += 1  # the first update would copy
    return average


@pytest.mark.parametrize("kind", [kind for kind in LAYERS if kind != "cp"])
def test_through_phases_of_full_rank_an_average_follows_the_dense_one(kind: str) -> None:
    run = Training(kind, ema, rank=1.0)
    for phase in (FULL, LOW, FULL, LOW):
        run.enter(phase)
        for _ in range(3):
            run.train(15)
            assert run.error < 0.15
            assert [p.shape for p in run.average.module.parameters()] == [p.shape for p in run.net.parameters()]
        assert dr.phases_of(run.average.module) == dr.phases_of(run.net)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_cut_average_is_near_the_best_cut_of_the_dense_one_and_near_the_nets_factors(kind: str) -> None:
    run = Training(kind, ema)
    run.train(40)
    weight, net_weight, layout, rank = (
        run.averaged.clone(),
        run.site.weight.detach().clone(),
        run.site.layout,
        run.site.rank,
    )
    run.enter(LOW)
    (averaged,) = switched_modules(run.average)["0.weight"]
    best = (layout.join(layout.split(weight, rank)) - weight).norm()
    lag, cut = (weight - net_weight).norm(), (run.site.weight.detach() - net_weight).norm()
    got = (averaged.weight.detach() - weight).norm()
    assert got < best + 0.25 * lag, "what it is to have, up to a part of the lag"
    for mine, its in zip(averaged.factors, run.site.factors, strict=True):
        assert (mine - its).norm() < its.norm() * lag / net_weight.norm() * 4, "like things are averaged"
    if kind == "cp":
        return
    assert got < cut + lag
    twin = copy.deepcopy(run.average.module)
    dr.enter_(twin, FULL)
    run.enter(FULL)
    assert torch.equal(run.averaged, switched_modules(twin)["0.weight"][0].weight.detach()), (
        "the product of its factors"
    )


def test_an_average_by_itself_would_be_of_unlike_things() -> None:
    """What `averages=` is for: cut by its own SVD, the average is lost within a few updates."""
    errors = []
    for along in (True, False):
        run = Training("linear", ema)
        run.train(60)
        if along:
            run.enter(LOW)
        else:
            with pytest.warns(dr.DynrankWarning, match="an AveragedModel of a net with the same sites"):
                dr.enter_(run.net, LOW, run.optimizer)
            with torch.no_grad():  # the same cut with other signs, which SVDs differ by
                dr.enter_(run.average.module, LOW)
                for factor in switched_modules(run.average)["0.weight"][0].factors:
                    factor.neg_()
        run.dense = run.averaged.clone()
        run.train(15)
        errors.append(run.error)
    assert errors[0] < 0.3
    assert errors[1] > 3 * errors[0]


def test_ranks_adaptors_and_failures() -> None:
    run = Training("linear", ema)
    run.train(20)
    run.enter(ADAPTOR)
    torch.testing.assert_close(run.averaged, run.dense)
    run.enter(FULL)
    dr.replan_(run.net, dr.plan_of(run.net).with_ranks({"0.weight": 3}), run.optimizer, averages=[run.average])
    run.enter(LOW)
    dr.replan_(run.net, dr.plan_of(run.net).with_ranks({"0.weight": 5}), run.optimizer, averages=[run.average])
    assert dr.plan_of(run.average.module) == dr.plan_of(run.net)
    run.train(2)
    run.enter(FULL)
    before = {name: value.clone() for name, value in run.average.state_dict().items()}

    def fails_after_the_average(sites: list[str], layout: object, weight: Tensor, rank: int) -> tuple[Tensor, ...]:
        return (torch.full((16, rank), torch.nan, dtype=torch.float64), torch.zeros(rank, 20, dtype=torch.float64))

    with pytest.raises(dr.TransitionError, match="finite factors"):
        dr.enter_(run.net, LOW, run.optimizer, averages=[run.average], split=fails_after_the_average)
    assert all(torch.equal(value, before[name]) for name, value in run.average.state_dict().items())
    run.train(2)


def test_a_failure_at_a_later_site_undoes_averages_too() -> None:
    torch.manual_seed(0)
    net = dr.transform(nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12)), (torch.randn(2, 12),), rank=dr.Fixed(2))
    average = ema(net)
    before = {name: value.clone() for name, value in average.state_dict().items()}

    def fails_at_the_last(sites: list[str], *_: object) -> None:
        if sites[0] == "1.weight":
            raise MemoryError("no room")

    with pytest.raises(MemoryError):
        dr.enter_(net, LOW, averages=[average], split=fails_at_the_last)
    after = average.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    dr.enter_(net, LOW, averages=[average])
    average.update_parameters(net)


def test_timms_average_and_a_copy_come_along() -> None:
    utils = pytest.importorskip("timm.utils")
    torch.manual_seed(0)
    x = torch.randn(4, 12)
    net = dr.transform(nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 8)), (x,), rank=dr.Fixed(2))
    averages = [utils.ModelEmaV3(net, decay=0.9), copy.deepcopy(net)]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    phases = dr.Phases(net, optimizer, dr.schedules.interleave(low=1, full=1), 4, averages=averages, random_init=True)
    for epoch in range(4):
        phases.begin(epoch)
        if epoch == 0:
            assert torch.equal(averages[1](x), net(x)), "random factors are those of the averages too"
        net(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        averages[0].update(net)
        assert dr.phases_of(averages[0].module) == dr.phases_of(averages[1]) == dr.phases_of(net)


def test_one_average_needs_no_list_even_one_that_can_be_iterated() -> None:
    net = dr.transform(nn.Sequential(nn.Linear(12, 16), nn.Tanh()), (torch.randn(2, 12),), rank=dr.Fixed(2))
    for make in (ema, copy.deepcopy, lambda net: nn.Sequential(copy.deepcopy(net))):
        average = make(net)
        for phase in (LOW, FULL):
            dr.enter_(net, phase, averages=average)
            assert dr.phases_of(average) == dr.phases_of(net) == {"0.weight": phase}


def test_sites_that_share_a_factor() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 16)
    net = dr.transform(Pair(), (x,), rank=dr.Fixed(3), share_inputs=True)
    average = ema(net)
    dr.enter_(net, LOW, averages=[average])
    torch.testing.assert_close(average(x), net(x))
    average.update_parameters(net)
    dr.enter_(net, FULL, averages=[average])
    torch.testing.assert_close(average(x), net(x))


def test_what_is_no_average_or_was_left_behind_is_refused_with_the_line_to_add() -> None:
    net = dr.transform(nn.Sequential(nn.Linear(12, 12)), (torch.randn(2, 12),), rank=dr.Fixed(2))
    average = ema(net)
    with pytest.raises(dr.TransitionError, match="str is no average"):
        dr.enter_(net, LOW, averages=["ema"])
    with pytest.raises(dr.TransitionError, match="Linear among the averages has other sites"):
        dr.enter_(net, LOW, averages=[nn.Linear(2, 2)])
    dr.enter_(net, LOW)
    with pytest.raises(
        dr.TransitionError, match=r"0\.weight in FULL at rank 2, and the net in LOW .* averages=\[average\]"
    ):
        dr.enter_(net, FULL, averages=[average])


def test_an_average_that_is_left_out_is_told_before_it_is_lost() -> None:
    net = dr.transform(nn.Sequential(nn.Linear(16, 16)), (torch.randn(2, 16),), rank=dr.Fixed(4))
    average, optimizer = AveragedModel(net), torch.optim.SGD(net.parameters(), lr=0.1)
    dr.enter_(copy.deepcopy(net), LOW)  # without an optimizer it is a copy that is about to be used for something else
    with pytest.warns(
        dr.DynrankWarning, match=r"an AveragedModel of a net with the same sites, .*averages=\[average\]"
    ):
        dr.enter_(net, LOW, optimizer)
    other = dr.transform(nn.Sequential(nn.Linear(16, 16)), (torch.randn(2, 16),), rank=dr.Fixed(4))
    dr.enter_(other, LOW, torch.optim.SGD(other.parameters(), lr=0.1))  # once of each
    assert dr.phases_of(average.module) == {"0.weight": FULL}


def test_all_objects_are_gone_through_once_for_a_copy_that_no_average_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    net = dr.transform(nn.Sequential(nn.Linear(17, 16)), (torch.randn(2, 17),), rank=dr.Fixed(4))
    kept, optimizer = copy.deepcopy(net), torch.optim.SGD(net.parameters(), lr=0.1)
    gone_through: list[int] = []
    objects = gc.get_objects
    monkeypatch.setattr(gc, "get_objects", lambda: gone_through.append(1) or objects())
    for phase in (LOW, FULL, LOW, FULL):
        dr.enter_(net, phase, optimizer)
    assert len(gone_through) == 1
    average = AveragedModel(net)
    with pytest.warns(dr.DynrankWarning, match="an AveragedModel of a net with the same sites"):
        dr.enter_(net, LOW, optimizer)
    assert dr.phases_of(kept) == dr.phases_of(average.module) == {"0.weight": FULL}


def test_averages_that_are_given_or_of_other_nets_are_no_matter() -> None:
    net = dr.transform(nn.Sequential(nn.Linear(16, 16)), (torch.randn(2, 16),), rank=dr.Fixed(4))
    other = dr.transform(nn.Sequential(nn.Linear(16, 12)), (torch.randn(2, 16),), rank=dr.Fixed(4))
    averages = AveragedModel(net), AveragedModel(other)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for phase in (LOW, FULL):
        dr.enter_(net, phase, optimizer, averages=averages[0])
    dr.enter_(net, LOW, optimizer, averages=averages[0].module)


def by_hand(average: nn.Module, net: nn.Module) -> None:
    with torch.no_grad():
        for mine, its in zip(average.parameters(), net.parameters(), strict=True):
            mine.lerp_(its, 0.1)


def loaded(average: nn.Module, net: nn.Module) -> None:
    average.load_state_dict(net.state_dict())


def trained(average: nn.Module, net: nn.Module) -> None:
    average.optimizer = torch.optim.SGD(average.parameters(), lr=0.1)
    average(torch.randn(2, 16)).sum().backward()
    average.optimizer.step()


@pytest.mark.parametrize("form", list(dr.Form))
@pytest.mark.parametrize("told", [by_hand, loaded, trained, lambda *_: None])
def test_a_copy_that_is_an_average_is_told_from_other_copies(told: Callable[..., None], form: dr.Form) -> None:
    net = dr.transform(nn.Sequential(nn.Linear(16, 16)), (torch.randn(2, 16),), rank=dr.Fixed(4), form=form)
    average, optimizer = copy.deepcopy(net), torch.optim.SGD(net.parameters(), lr=0.1)
    told(average, net)
    if told is by_hand:
        with pytest.warns(dr.DynrankWarning, match=r"a copy of a net .*, written to by hand, .*averages=\[average\]"):
            dr.enter_(net, LOW, optimizer)
        with pytest.raises(RuntimeError, match="size of tensor"):
            by_hand(average, net)
        return
    dr.enter_(net, LOW, optimizer)
    if told is loaded:
        loaded(average, net)
        assert dr.phases_of(average) == dr.phases_of(net)


def test_an_average_of_bare_tensors_stops_at_its_next_update() -> None:
    """No net holds them, so that nothing can be told of them before: neither by name nor by place they can be mixed."""
    net = dr.transform(nn.Sequential(nn.Linear(16, 16)), (torch.randn(2, 16),), rank=dr.Fixed(4))
    by_name = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

    def update_by_name() -> None:
        for name, parameter in net.named_parameters():
            by_name[name].lerp_(parameter.detach(), 0.1)

    def update_by_place() -> None:
        for mine, its in zip(by_name.values(), net.parameters(), strict=False):
            mine.lerp_(its.detach(), 0.1)

    update_by_name()
    update_by_place()
    dr.enter_(net, LOW, optimizer)
    with pytest.raises(KeyError, match=r"0\.left"):
        update_by_name()
    with pytest.raises(RuntimeError, match="size of tensor"):
        update_by_place()
