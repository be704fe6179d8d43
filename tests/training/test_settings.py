"""One place for every choice: what has it there, is had by presets, callbacks, fit and the command line."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest
import torch

import dynrank_fx as dr
from dynrank_fx.cli.train import train
from dynrank_fx.training import PhaseSettings, Preset, Settings, practical

PHASE_CHOICES = [each.name for each in fields(PhaseSettings)]
OTHER = {
    "carry": dr.Carry.RESET,
    "rewarm": 7,
    "decay": dr.Decay.HALVED,
    "factor_steps": dr.Steps.PRODUCT,
    "random_init": True,
    "landing": True,
    "spectra": False,
    "cost_by": dr.CostBy.TIME,
}
# Spectra are what the report shows: the command line always records them.
OPTIONS = {"random_init": "init", "spectra": None}


@pytest.mark.parametrize("choice", PHASE_CHOICES)
def test_a_choice_of_phases_can_be_made_everywhere(choice: str) -> None:
    value = OTHER[choice]
    assert getattr(Settings(3, **{choice: value}), choice) == value
    preset = Preset(dr.schedules.always(dr.Phase.LOW), **{choice: value})
    assert preset.choices[choice] == value
    assert getattr(Settings(3, **preset.choices), choice) == value
    option = OPTIONS.get(choice, choice)
    assert option is None or option in {each.name for each in train.params}


def test_choices_are_those_of_phases_and_nothing_else() -> None:
    settings = Settings(3, device="meta", amp=torch.bfloat16, **OTHER)
    assert settings.choices == OTHER
    assert PhaseSettings(**settings.choices) == PhaseSettings(**OTHER)
    assert list(practical().choices) == PHASE_CHOICES


def test_settings_are_frozen_and_comparable() -> None:
    assert Settings(3, rewarm=2) == Settings(epochs=3, rewarm=2)
    assert Settings(3) != Settings(3, rewarm=2)
    with pytest.raises(FrozenInstanceError):
        Settings(3).rewarm = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    ("choice", "sentence"),
    [
        ({"amp": True}, "amp is True: give torch.bfloat16"),
        ({"cost_by": "time"}, r"cost_by is 'time': give one of CostBy\.FLOPS"),
        ({"compile": "fast"}, r"compile is 'fast': give True, False, or a mode of torch.compile \(default, max"),
        ({"compile": 1}, "compile is 1: give True, False"),
        ({"activation_memory": 2}, "activation_memory is a share, from 0 to 1, not 2"),
        ({"activation_memory": 0.5, "compile": False}, "activation_memory is kept to by torch.compile, and compile is"),
        ({"accumulate": 0}, "a step of 0 batches is none"),
        ({"accumulate": 1.5}, "a step of 1.5 batches is none"),
        ({"clip": 0}, "gradients cannot be clipped to a norm of 0"),
        ({"clip": "1"}, "gradients cannot be clipped to a norm of '1'"),
    ],
)
def test_what_cannot_be_is_refused(choice: dict[str, Any], sentence: str) -> None:
    with pytest.raises(dr.errors.DynrankError, match=sentence):
        Settings(3, **choice)
