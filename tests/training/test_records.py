"""What is kept of the ticks of a run: spectra that are thinned, learning rates, and a state that stays small."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

import dynrank_fx as dr
from dynrank_fx.training import records


def made() -> nn.Module:
    torch.manual_seed(0)
    return dr.transform(
        nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8)), (torch.randn(2, 12),), rank=dr.Fixed(2)
    )


def begun_and_trained(epochs: int, total: int, resume: Any = None) -> dr.Phases:
    """Epochs in turn LOW and FULL, of a learning rate that falls in each."""
    net = made()
    if resume is not None:
        dr.resume_phases_(net, resume)
    optimizer = SGD(net.parameters(), lr=0.1)
    phases = dr.Phases(net, optimizer, dr.schedules.interleave(low=1, full=1), total, resume=resume)
    for epoch in range(phases.begun, epochs):
        optimizer.param_groups[0]["lr"] = 0.1 / (epoch + 1)
        phases.begin(epoch)
    return phases


def test_a_state_is_bounded_in_the_number_of_epochs_and_goes_on_from_what_it_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(records, "_KEPT", 10_000)
    few, many = begun_and_trained(60, 200).state_dict(), begun_and_trained(150, 200).state_dict()
    for state in (few, many):
        assert len(json.dumps(state["history"])) <= 10_000
    assert len(json.dumps(many)) - len(json.dumps(few)) < 30 * 90 + 1000, "a number for an epoch more"
    kept = [record["epoch"] for record in many["history"]]
    assert kept == list(range(150 - len(kept), 150))
    assert many["rates"] == [0.1 / (epoch + 1) for epoch in range(150 - len(kept))]

    whole, seen = begun_and_trained(152, 200), []
    again = begun_and_trained(150, 200, many)
    assert again.begun == 150
    assert "epoch 150 of 200" in repr(again)
    schedule = again.schedule
    again.schedule = lambda state: seen.append(state) or schedule(state)  # type: ignore[func-returns-value]
    again.optimizer.param_groups[0]["lr"] = 0.1 / 151
    record = again.begin(150)
    assert (record.phases, record.spent) == (whole.history[150].phases, pytest.approx(whole.history[150].spent))
    assert seen[0].lrs[:151] == pytest.approx([each.lr for each in whole.history[:151]])
    assert again.state_dict()["rates"][:10] == many["rates"][:10]
    with pytest.raises(dr.ScheduleError, match=r"^epoch 3 cannot begin again, since the state .* only from"):
        again.begin(3)
    assert again.begin(0).spent == pytest.approx(whole.history[0].spent)
    assert again.begun == 1


def test_one_record_larger_than_the_bound_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "_KEPT", 1)
    state = begun_and_trained(3, 5).state_dict()
    assert [record["epoch"] for record in state["history"]] == [2]
    assert len(begun_and_trained(3, 5, state).history) == 1


def test_spectra_are_thinned_at_the_same_places_and_the_shorter_one_ends_in_zeros() -> None:
    long, short = torch.linspace(100.0, 1.0, 100), torch.tensor([3.0, 2.0])
    ((before, after),) = records.thinned({"fc": long}, {"fc": short}).values()
    assert len(before) == len(after) == 64
    assert (before[0], before[-1], sum(after)) == (100.0, 1.0, sum(after[:2]))
    assert records.thinned({"fc": short}, {"fc": short[:1]}) == {"fc": ((3.0, 2.0), (3.0, 0.0))}
