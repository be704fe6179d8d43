"""Whole ways to train: which schedule, ranks and choices go together, and what a net goes through under them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from torch import nn

import dynrank_fx as dr
from dynrank_fx.schedules import EpochRecord
from dynrank_fx.training import PhaseSettings, Preset, paper_cifar10, paper_cifar100, practical

FULL, LOW, ADAPTOR = dr.Phase
ALL: dict[Callable[[], Preset], int] = {practical: 20, paper_cifar10: 150, paper_cifar100: 200}
each = pytest.mark.parametrize("make", ALL, ids=lambda make: make.__name__)


def test_the_practical_preset_is_auto_with_all_that_keeps_what_was_learnt() -> None:
    expected = PhaseSettings(decay=dr.Decay.PRODUCT, landing=True)
    for preset, cost in ((practical(), 0.75), (practical(0.6), 0.6)):
        assert preset.schedule == dr.schedules.auto(cost)
        assert preset.rank == dr.Ratio(0.25)
        assert PhaseSettings(**preset.choices) == expected


def test_the_papers_presets_differ_in_their_epochs_only() -> None:
    expected = PhaseSettings(carry=dr.Carry.RESET, decay=dr.Decay.EACH, random_init=True)
    for preset, schedule in (
        (paper_cifar10(), dr.schedules.paper_cifar10()),
        (paper_cifar100(), dr.schedules.paper_cifar100()),
    ):
        assert (preset.schedule, preset.rank) == (schedule, dr.Ratio(0.5))
        assert PhaseSettings(**preset.choices) == expected


@pytest.mark.parametrize("make", [paper_cifar10, paper_cifar100])
def test_the_papers_presets_go_through_low_full_and_adaptor_in_this_order(make: Callable[[], Preset]) -> None:
    phases = [make().schedule(dr.TrainState(epoch)) for epoch in range(ALL[make])]
    assert list(dict.fromkeys(phases)) == [LOW, FULL, ADAPTOR]
    assert phases == sorted(phases, key=[LOW, FULL, ADAPTOR].index), "each once"


def test_a_way_of_ones_own_has_a_quarter_of_the_rank_and_the_decay_of_the_product() -> None:
    own = Preset(dr.schedules.always(LOW))
    assert (own.rank, own.decay) == (dr.Ratio(0.25), dr.Decay.PRODUCT)
    assert PhaseSettings(**own.choices) == PhaseSettings(decay=dr.Decay.PRODUCT)
    with pytest.raises(TypeError, match="schedule"):
        Preset()  # type: ignore[call-arg]


@each
def test_a_preset_is_a_frozen_value_that_can_be_changed_by_a_copy(make: Callable[[], Preset]) -> None:
    preset = make()
    assert preset == make()
    changed = replace(preset, rewarm=3)
    assert changed != preset
    assert changed.choices == preset.choices | {"rewarm": 3}
    with pytest.raises(FrozenInstanceError):
        preset.rank = dr.Fixed(1)  # type: ignore[misc]


def trained(preset: Preset, epochs: int) -> list[EpochRecord]:
    """Two linears of 16 by 16, a step an epoch."""
    torch.manual_seed(0)
    layers, x = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16)), torch.randn(4, 16)
    net = dr.transform(layers, (x,), rank=preset.rank, allow_unprofitable=True)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    phases = dr.Phases(net, optimizer, preset.schedule, epochs, steps=1, **preset.choices)
    for epoch in range(epochs):
        phases.begin(epoch)
        net(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return phases.history


def test_the_practical_preset_stays_within_its_share_of_compute_and_ends_in_low() -> None:
    records = trained(practical(0.7), 20)
    assert all(set(record.ranks.values()) == {4} for record in records)
    assert records[-1].spent <= 0.7 * 20
    assert records[-1].phase == "LOW"
    assert "FULL" in {record.phase for record in records}


@pytest.mark.parametrize("make", [paper_cifar10, paper_cifar100])
def test_the_papers_presets_train_a_net_in_the_phases_of_their_schedule(make: Callable[[], Preset]) -> None:
    records = trained(make(), ALL[make])
    assert all(set(record.ranks.values()) == {8} for record in records)
    expected = [make().schedule(dr.TrainState(epoch)) for epoch in range(ALL[make])]
    assert [set(record.phases.values()) for record in records] == [{phase} for phase in expected]
