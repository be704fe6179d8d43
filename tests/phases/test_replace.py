"""The one place where parameters change, and the journal that undoes it."""

from __future__ import annotations

import pytest
import torch
from switching import assert_same, chain, snapshot, trained
from torch import nn

import dynrank_fx as dr
from dynrank_fx.phases import replace


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
