"""Contracts 5, 7, 8, 11 and 12: which tensors the net and the optimizer hold, and what became of the original's."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from grid import ADAPTOR, CAPTURES, FULL, KINDS, LOW, PAIRS, Cell, cells, seeded
from models import Tied, randomized
from torch import Tensor, nn
from torch.optim import Optimizer

import dynrank_fx as dr
from dynrank_fx.rewrite import Switched, switched_modules

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")

# What the factors are called, said once more: state_dicts and checkpoints hold these names.
FACTORS = {"tucker": {"left", "core", "right"}, "cp": {"left", "along", "across", "right"}}


def trained(net: nn.Module, x: Tensor) -> Optimizer:
    """An optimizer with state, after one step."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    step(net, x, optimizer)
    return optimizer


def step(net: nn.Module, x: Tensor, optimizer: Optimizer) -> None:
    net(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


@cells(every_day=PAIRS)
def test_what_does_not_train_is_not_there(cell: Cell, device: str) -> None:
    net, x = cell.net(device=device), cell.inputs(device=device)
    optimizer = torch.optim.AdamW(net.parameters())
    for phase in (LOW, FULL, ADAPTOR, LOW, ADAPTOR):
        dr.enter_(net, phase, optimizer)
        step(net, x, optimizer)
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for p in net.parameters()}
        assert all(id(p) in held for p in optimizer.state)
        for p, state in optimizer.state.items():
            assert all(value.shape == p.shape for name, value in state.items() if name.startswith("exp_avg"))
        for name, modules in switched_modules(net).items():
            wanted = {"weight"} if phase is FULL else FACTORS.get(modules[0].layout.name, {"left", "right"})
            for module in modules:
                found = {key for key, p in module._parameters.items() if p is not None} - {"bias"}
                assert found == wanted, name
                assert (module._buffers["base"] is not None) == (phase is ADAPTOR)
        kept = {name for name, _ in net.named_parameters(remove_duplicate=False)}
        bare = {name for name in kept if phase is FULL and name.removesuffix(".weight") in net.state_dict()}
        assert {name.removesuffix(".weight") if name in bare else name for name in kept} <= set(net.state_dict())
        assert sum(".base" in name for name in net.state_dict()) == (
            sum(map(len, switched_modules(net).values())) if phase is ADAPTOR else 0
        )


@cells(every_day=CAPTURES)
def test_weights_load_by_name_in_both_directions(cell: Cell, device: str) -> None:
    net, x = cell.net(device=device).eval(), cell.inputs(device=device)
    model, other = cell.model(device=device).eval(), cell.model(device=device, seed=5).eval()
    assert sorted(net.state_dict()) == sorted(model.state_dict())
    net.load_state_dict(other.state_dict())
    assert torch.equal(net(x), other(x))
    model.load_state_dict(net.state_dict())
    assert torch.equal(model(x), other(x))


def ties(module: nn.Module, renamed: bool = False) -> set[frozenset[str]]:
    """The names of every parameter, those of one parameter together."""
    found: dict[int, set[str]] = {}
    for name, p in module.named_parameters(remove_duplicate=False):
        found.setdefault(id(p), set()).add(name)
    return {frozenset(names) for names in found.values()}


@cells(every_day=PAIRS)
def test_tied_weights_stay_tied_in_every_phase_and_after_the_cut(cell: Cell) -> None:
    net, model = cell.net(), cell.model()
    original = dict(model.named_parameters(remove_duplicate=False))
    for phase in (FULL, LOW, ADAPTOR, LOW):
        dr.enter_(net, phase)
        for row in dr.plan_of(net).sites:
            names = [name for name, p in original.items() if p is original[row.site.name]]
            assert sorted(names) == sorted((row.site.name, *row.site.aliases))
            holders = [
                net.get_submodule(name if isinstance(_at(net, name), Switched) else _path(name)) for name in names
            ]
            assert all(isinstance(holder, Switched) for holder in holders)
            for holder in holders:
                assert all(holder._parameters[key] is holders[0]._parameters[key] for key in holder.parameter_names)
        twin = copy.deepcopy(net)
        assert ties(twin) == ties(net)
    small = dr.truncate(net)
    low = dict(net.named_parameters(remove_duplicate=False))
    for together in ties(small):
        assert len({id(low[name]) for name in together if name in low}) <= 1
    assert len(list(small.parameters())) == len(list(net.parameters()))


@pytest.mark.parametrize("how", list(dr.Capture), ids=lambda how: how.name)
def test_an_embedding_and_its_head_share_factors_that_serve_both(how: dr.Capture) -> None:
    torch.manual_seed(0)
    model, x = randomized(Tied()), torch.randint(20, (3, 7))
    net = dr.transform(model, (x,), rank=dr.Ratio(0.5), how=how, allow_unprofitable=True)
    assert not dr.plan_of(net).skipped
    dr.enter_(net, LOW)
    for factor in ("left", "right"):
        assert net.get_parameter(f"embed.{factor}") is net.get_parameter(f"head.{factor}")
    weight = net.get_submodule("embed").weight
    table = nn.functional.embedding(x, weight)
    torch.testing.assert_close(net.get_submodule("embed")(x), table)
    torch.testing.assert_close(net.get_submodule("head")(table), table @ weight.T)


def _at(net: nn.Module, name: str) -> Any:
    try:
        return net.get_submodule(name)
    except AttributeError:
        return None


def _path(name: str) -> str:
    return name.rpartition(".")[0]


@cells(lambda cell: cell.case.name == "dropout and batch norm")
def test_train_and_eval_and_buffers_behave_as_in_the_original_after_deepcopy_too(cell: Cell, device: str) -> None:
    """The case whose modes differ."""
    model, net, x = cell.model(device=device), cell.net(device=device), cell.inputs(device=device)
    for mode in (True, False, True, False):
        assert torch.equal(seeded(model.train(mode), x), seeded(net.train(mode), x))
    buffers = dict(net.named_buffers())
    for name, buffer in model.named_buffers():
        assert torch.equal(buffers[name], buffer), name
    twin = copy.deepcopy(net)
    dr.enter_(twin, LOW)
    assert set(dr.phases_of(net).values()) == {FULL}, "a copy has switches of its own"
    assert torch.equal(net.eval()(x), model.eval()(x))
    before = [buffer.clone() for buffer in twin.buffers()]
    assert torch.equal(seeded(twin.eval(), x), seeded(copy.deepcopy(twin), x))
    assert all(torch.equal(now, then) for now, then in zip(twin.buffers(), before, strict=True))
    twin.train()(x)
    assert not all(torch.equal(now, then) for now, then in zip(twin.buffers(), before, strict=True))


@cells(every_day=PAIRS)
def test_weight_and_bias_are_readable_in_every_phase_and_writable_in_full_only(cell: Cell) -> None:
    net, model = cell.net(1.0), dict(cell.model().named_parameters(remove_duplicate=False))
    biases = {name: p for name, p in model.items() if p.ndim == 1}
    for phase in (FULL, LOW, ADAPTOR):
        dr.enter_(net, phase)
        for name, bias in biases.items():
            assert torch.equal(net.get_parameter(name), bias)
        for name, modules in switched_modules(net).items():
            for module in modules:
                assert (module.weight.shape, module.weight.dtype) == (model[name].shape, model[name].dtype)
                if phase is FULL or cell.layout is not dr.CPLayout:
                    torch.testing.assert_close(module.weight.detach(), model[name].detach(), rtol=1e-9, atol=1e-9)
                module.weight.sum().backward()
                assert all(module._parameters[key].grad is not None for key in module.parameter_names)
                if phase is FULL:
                    module.weight = nn.Parameter(module.weight.detach().clone())
                else:
                    with pytest.raises(dr.TransitionError, match=f"no weight to write in {phase.name}"):
                        module.weight = nn.Parameter(model[name].detach())
            if phase is FULL:
                for module in modules:  # as one parameter again
                    module.weight = modules[0].weight
        net.zero_grad()


def snapshot(net: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """All that a transition may change, with the parameters themselves."""
    sites = {name: [(m.phase, m.rank, m._buffers["base"]) for m in ms] for name, ms in switched_modules(net).items()}
    return {
        "sites": copy.deepcopy(sites),
        "parameters": dict(net.named_parameters(remove_duplicate=False)),
        "values": {name: t.clone() for name, t in net.state_dict().items()},
        "groups": [{key: list(v) if key == "params" else v for key, v in g.items()} for g in optimizer.param_groups],
        "state": dict(sorted(copy.deepcopy(optimizer.state_dict()["state"]).items())),
    }


def assert_same(now: Any, before: Any, where: str = "") -> None:
    if isinstance(before, dict):
        assert list(now) == list(before), where
        for key in before:
            assert_same(now[key], before[key], f"{where}.{key}")
    elif isinstance(before, list | tuple):
        assert len(now) == len(before), where
        for i, each in enumerate(before):
            assert_same(now[i], each, f"{where}.{i}")
    elif isinstance(before, nn.Parameter):
        assert now is before, where
    elif isinstance(before, Tensor):
        assert torch.equal(now, before), where
    else:
        assert now == before, where


@cells(every_day=PAIRS)
def test_a_transition_that_fails_at_the_last_site_leaves_everything_as_it_was(cell: Cell) -> None:
    net, x = cell.net(), cell.inputs()
    optimizer = trained(net, x)
    before, names = snapshot(net, optimizer), list(switched_modules(net))
    seen = []

    def fails_at_the_last(sites: Any, *_: Any) -> None:
        seen.append(sites[0])
        if sites[0] == names[-1]:
            raise MemoryError("no room")

    with pytest.raises(MemoryError):
        dr.enter_(net, LOW, optimizer, split=fails_at_the_last)
    assert seen == names, "the sites before it had been switched"
    assert_same(snapshot(net, optimizer), before)
    step(net, x, optimizer)


@cells(every_day=PAIRS)
@pytest.mark.parametrize("phase", [FULL, LOW])
def test_non_finite_weights_are_refused_and_nothing_is_switched(cell: Cell, phase: dr.Phase) -> None:
    net, x = cell.net(), cell.inputs()
    dr.enter_(net, phase)
    optimizer, last = trained(net, x), switched_modules(net)[cell.sites[-1]][0]
    with torch.no_grad():
        last._parameters[last.parameter_names[0]].flatten()[0] = float("inf")
    before = snapshot(net, optimizer)
    with pytest.raises(dr.TransitionError, match="non-finite weights: nothing was switched"):
        dr.enter_(net, LOW if phase is FULL else FULL, optimizer)
    assert_same(snapshot(net, optimizer), before)


@cells(every_day=KINDS)
def test_a_net_is_pickled_in_every_phase_and_goes_on_as_the_same_net(cell: Cell) -> None:
    net, x = cell.net(), cell.inputs()
    for phase, then in ((FULL, LOW), (LOW, FULL), (ADAPTOR, LOW)):
        dr.enter_(net, phase)
        twin = pickle.loads(pickle.dumps(net))
        assert type(twin).__name__ == type(net).__name__
        assert dr.phases_of(twin) == dr.phases_of(net)
        assert dr.plan_of(twin) == dr.plan_of(net)
        assert ties(twin) == ties(net)
        one, other = copy.deepcopy(net), twin
        for mode in (True, False):
            assert torch.equal(seeded(one.train(mode), x), seeded(other.train(mode), x))
        dr.enter_(one, then)
        dr.enter_(other, then)
        assert torch.equal(seeded(one, x), seeded(other, x))


@cells(every_day=KINDS)
@pytest.mark.parametrize("strict", [True, False])
def test_a_state_brings_the_net_into_the_phases_and_ranks_that_it_has(cell: Cell, strict: bool) -> None:
    saved, x = cell.net(), cell.inputs()
    ranks = {row.site.name: max(1, row.rank - 1) for row in dr.plan_of(saved).sites}
    dr.replan_(saved, dr.plan_of(saved).with_ranks(ranks))
    net = copy.deepcopy(cell.net())
    first = cell.sites[0]
    for setting in (LOW, FULL, {first: ADAPTOR}, ADAPTOR, {first: LOW}):
        dr.enter_(saved, setting)
        net.load_state_dict(saved.state_dict(), strict=strict)
        assert dr.phases_of(net) == dr.phases_of(saved)
        assert torch.equal(seeded(net, x), seeded(saved, x))
        assert ties(net) == ties(saved)
        held = {name: module[0].rank for name, module in switched_modules(net).items()}
        low = {name for name, phase in dr.phases_of(net).items() if phase is not FULL}
        for row in dr.plan_of(net).sites:
            name = row.site.name
            assert row.rank == held[name]
            if name in low:
                shapes = [tuple(p.shape) for p in switched_modules(net)[name][0].factors]
                assert shapes == [tuple(p.shape) for p in switched_modules(saved)[name][0].factors]
    twin = copy.deepcopy(net)
    dr.enter_(saved, FULL)
    twin.load_state_dict(saved.state_dict(), strict=strict)
    assert set(dr.phases_of(twin).values()) == {FULL}
    assert torch.equal(seeded(twin, x), seeded(saved, x))
    assert set(dr.phases_of(net).values()) != {FULL}, "a copy loads for itself"
