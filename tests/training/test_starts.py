"""Cuts that begin where the last ones ended: as good as any, remembered across a stop, and forgotten in LOW."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

import dynrank_fx as dr
from dynrank_fx import store
from dynrank_fx.errors import StoreError
from dynrank_fx.layouts import svd
from dynrank_fx.rewrite import site_groups, switched_modules
from dynrank_fx.training.landing import Landing
from dynrank_fx.training.starts import Starts
from dynrank_fx.training.state_tree import flatten, unflatten

FULL, LOW = dr.Phase.FULL, dr.Phase.LOW


def made(share: bool = False) -> tuple[nn.Module, Optimizer, Tensor]:
    """Widths beyond those at which a small matrix is cut by its plain SVD."""
    torch.manual_seed(0)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.a, self.b = nn.Linear(140, 160), nn.Linear(160, 140), nn.Linear(160, 140)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(self.wide(x))
            return self.a(x) * self.b(x)

    x = torch.randn(8, 140)
    net = dr.transform(Two(), (x,), rank=dr.Fixed(16), share_inputs=share)
    return net, AdamW(net.parameters(), lr=1e-3), x


def trained(net: nn.Module, optimizer: Optimizer, x: Tensor, steps: int) -> None:
    for _ in range(steps):
        net(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture
def proven(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each basis that was followed was found good enough."""
    seen: list[bool] = []
    real = svd.warm_basis

    def watched(*arguments: object) -> object:
        found = real(*arguments)  # type: ignore[arg-type]
        seen.append(found is not None)
        return found

    monkeypatch.setattr(svd, "warm_basis", watched)
    return seen


def phases(net: nn.Module, optimizer: Optimizer, **choices: object) -> dr.Phases:
    return dr.Phases(net, optimizer, dr.schedules.interleave(low=1, full=1), 6, steps=4, **choices)  # type: ignore[arg-type]


@pytest.mark.parametrize("landing", [False, True])
@pytest.mark.parametrize("share", [False, True])
def test_cuts_after_the_first_are_followed_and_within_the_bound(landing, share, proven):
    net, optimizer, x = made(share)
    at_work = phases(net, optimizer, landing=landing, by_itself=False)
    cuts = 0
    for epoch in range(6):
        sites = switched_modules(net)
        before = {name: modules[0].weight.detach().double() for name, modules in sites.items()}
        at_work.begin(epoch)
        for group in site_groups(net):
            if epoch and group.owner.phase == int(LOW):
                W = torch.cat([before[name] for name in group.names])
                least = torch.linalg.svdvals(W)[16:].norm()
                assert float((group.weight.double() - W).norm()) <= 1.001 * float(least) + 1e-5 * float(W.norm())
                cuts += 1
        trained(net, optimizer, x, 4)
    assert cuts == len(proven) > 3
    assert all(proven)


@pytest.mark.parametrize("done", [5, 15, 20])
@pytest.mark.parametrize("share", [False, True])
def test_a_cut_begins_with_the_basis_of_a_landing_however_far_that_is(share, done, proven, monkeypatch):
    """A landing of 20 steps, of which some are done: what is left beyond the rank is cut as well as by torch.linalg."""
    net, optimizer, x = made(share)
    landing = Landing(net, optimizer)
    landing.begin({group.name: 20 for group in site_groups(net)})
    trained(net, optimizer, x, done)
    before = {name: modules[0].weight.detach().double() for name, modules in switched_modules(net).items()}
    monkeypatch.setattr(svd, "right_basis", None)  # no cut finds its directions anew
    dr.enter_(net, LOW, optimizer, split=Starts(landing).split)
    assert len(proven) == len(site_groups(net)) > 1
    assert all(proven)
    for group in site_groups(net):
        W = torch.cat([before[name] for name in group.names])
        least = float(torch.linalg.svdvals(W)[16:].norm())
        assert (least > 0.1 * float(W.norm())) == (done < 20), "a landing that is done has left nothing to cut away"
        assert float((group.weight.double() - W).norm()) <= 1.001 * least + 1e-5 * float(W.norm())


def test_a_run_that_was_stopped_in_full_cuts_to_the_same_bits(proven):
    net, optimizer, x = made()
    at_work = phases(net, optimizer)
    while not (at_work.step == 6 and dr.phases_of(net)["wide.weight"] is FULL):
        assert at_work.step < 12
        trained(net, optimizer, x, 1)
    twin, twins = copy.deepcopy((net, optimizer))
    resumed = phases(twin, twins, resume=copy.deepcopy(at_work.state_dict()))
    for one, its in ((net, optimizer), (twin, twins)):
        trained(one, its, x, 4)
    assert len(proven) >= 6
    assert all(proven)
    assert dr.phases_of(net)["wide.weight"] is LOW
    assert resumed.step == at_work.step
    for mine, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_what_is_kept_is_of_half_the_size_and_only_where_a_site_is_full():
    net, optimizer, x = made()
    at_work = phases(net, optimizer)
    kept = []
    for _ in range(24):
        starts = at_work.hooks_state()["starts"]
        kept.append(bool(starts))
        low = [name for name, phase in dr.phases_of(net).items() if phase is LOW]
        assert not set(low) & set(starts)
        for (start,) in starts.values():
            assert start.dtype is torch.bfloat16
            assert start.numel() == 16 * 140
        trained(net, optimizer, x, 1)
    assert any(kept)
    assert not all(kept)


@pytest.mark.parametrize("state", [3, {"a": 3}, {"a": (3,)}])
def test_a_state_of_something_else_is_refused(state):
    with pytest.raises(StoreError, match="the state of where cuts begin is damaged"):
        Starts().load(state)


def test_of_small_weights_nothing_is_kept():
    torch.manual_seed(0)
    x = torch.randn(4, 20)
    net = dr.transform(nn.Linear(20, 30), (x,), rank=dr.Fixed(4))
    dr.enter_(net, LOW)
    assert Starts.of_factors(net, ["weight"]) == {}


def test_the_state_goes_through_a_file(tmp_path):
    net, optimizer, x = made()
    at_work = phases(net, optimizer)
    while not at_work.hooks_state()["starts"]:
        trained(net, optimizer, x, 1)
    tree, tensors = flatten(at_work.state_dict(), "phases")
    store.write(tmp_path / "state", tensors, {"tree": tree})
    tensors, info = store.read(tmp_path / "state")
    again = unflatten(info["tree"], tensors)["starts"]
    for name, (start,) in at_work.hooks_state()["starts"].items():
        assert torch.equal(again[name][0], start)
    Starts().load(again)
