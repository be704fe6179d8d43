"""The one place where parameters change, and the journal that undoes it."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch
from switching import assert_same, chain, snapshot, trained
from torch import nn

import dynrank_fx as dr
from dynrank_fx.phases import replace
from dynrank_fx.phases.groups import in_slots
from dynrank_fx.processes import Shards
from dynrank_fx.rewrite import Switched, switched_modules


def test_a_full_disk_is_a_sentence_and_changes_nothing(monkeypatch):
    net = chain()
    optimizer = trained(net)
    before = snapshot(net, optimizer)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(replace.torch, "save", full)
    with pytest.raises(dr.TransitionError, match="No space left on device"):
        dr.enter_(net, dr.Phase.LOW, optimizer)
    assert_same(net, optimizer, before)


def test_a_full_disk_is_told_with_the_folder_and_leaves_the_net_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch.save says it, in a RuntimeError of its own."""
    from dynrank_fx.phases import replace

    net = dr.transform(nn.Sequential(nn.Linear(16, 16)), (torch.randn(2, 16),), rank=dr.Fixed(2))
    before = {name: p.detach().clone() for name, p in net.named_parameters()}

    def full(record: object, path: object) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")

    monkeypatch.setattr(replace.torch, "save", full)
    with pytest.raises(dr.TransitionError, match="cannot be written to, its disk may be full"):
        dr.enter_(net, dr.Phase.LOW)
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())


def test_the_journal_leaves_no_file_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    net = chain()
    dr.enter_(net, dr.Phase.LOW, trained(net))
    assert list(tmp_path.iterdir()) == []


def factors_for(module: Switched) -> dict[str, nn.Parameter]:
    rows, columns = module.shape
    return {"left": nn.Parameter(torch.ones(rows, 4)), "right": nn.Parameter(torch.ones(4, columns))}


def test_all_modules_of_a_site_hold_the_new_parameters_and_the_optimizer_trains_them():
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
    model[2].weight = model[0].weight
    net = dr.transform(model, (torch.randn(2, 16),), rank=dr.Fixed(4))
    (modules,) = switched_modules(net).values()
    optimizer, new = trained(net), factors_for(modules[0])
    old = replace.parameters_of(modules[0])
    assert old == (modules[1].weight,)
    with in_slots([optimizer]):
        replace.replace_parameters(modules, dr.Phase.LOW, new, optimizer, [{}, {}])
    for module in modules:
        assert replace.parameters_of(module) == tuple(new.values())
        assert module._parameters["weight"] is None
        assert module.phase == int(dr.Phase.LOW)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in net.parameters()}
    assert not any(p is old[0] for p in optimizer.state)


@pytest.mark.parametrize("held", [True, False], ids=["somebody holds the old weight", "nobody does"])
def test_a_journal_puts_back_values_ranks_phases_and_optimizer_after_an_error(held):
    net = chain()
    optimizer = trained(net)
    before = snapshot(net, optimizer)
    ((first,), (second,), _) = switched_modules(net).values()
    weights = [site.weight for site in (first, second)] if held else []
    with suppress(KeyError), in_slots([optimizer]), replace.Journal(Shards(())) as journal:
        for module in (first, second):
            journal.keep([module], replace.parameters_of(module), optimizer, [None])
            module.rank = 9
            replace.replace_parameters([module], dr.Phase.LOW, factors_for(module), optimizer, [{}, {}])
        raise KeyError
    assert_same(net, optimizer, before)
    assert (first.rank, second.rank) == (4, 4)
    assert all(site.weight is weight for site, weight in zip((first, second), weights, strict=False))


def test_a_journal_that_ends_well_keeps_what_was_done():
    net = chain()
    ((module,), *_) = switched_modules(net).values()
    new = factors_for(module)
    with replace.Journal(Shards(())) as journal:
        journal.keep([module], replace.parameters_of(module), None, [None])
        replace.replace_parameters([module], dr.Phase.LOW, new, None, [{}, {}])
    assert replace.parameters_of(module) == tuple(new.values())
