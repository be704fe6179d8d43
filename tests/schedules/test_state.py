"""What a schedule is told and what it answers: plain frozen values, in which nothing is known until it is said."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import subprocess
import sys

import pytest

import dynrank_fx as dr
from dynrank_fx.schedules import Decision, Schedule, Setting, SiteState

FULL, LOW = dr.Phase.FULL, dr.Phase.LOW
SITE = SiteState(FULL, 4, 0.8, 0.2, groups=2, sharing=("q", "k"))
STATE = dr.TrainState(3, 10, 0.1, {"q": (2.0, 1.0)}, 2.5, (0.1, 0.01), {"q": SITE})
DECISION = Decision({"q*": LOW}, ("because",))
by_value = pytest.mark.parametrize("value", [SITE, STATE, DECISION], ids=lambda value: type(value).__name__)


@by_value
def test_a_value_is_frozen_and_equals_its_copies(value: object) -> None:
    for name in [each.name for each in dataclasses.fields(value)]:  # type: ignore[arg-type]
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, name, None)
    assert copy.deepcopy(value) == pickle.loads(pickle.dumps(value)) == value


@by_value
def test_a_value_differs_from_one_that_differs_in_any_field(value: object) -> None:
    for each in dataclasses.fields(value):  # type: ignore[arg-type]
        mine = getattr(value, each.name)
        other = mine + 1 if isinstance(mine, int | float) else "another"
        assert dataclasses.replace(value, **{each.name: other}) != value  # type: ignore[type-var]


def test_only_the_epoch_has_to_be_known() -> None:
    state = dr.TrainState(0)
    assert (state.epochs, state.lr, state.spent) == (None, None, 0.0)
    assert (dict(state.spectra), state.lrs, dict(state.sites)) == ({}, (), {})
    with pytest.raises(TypeError, match="epoch"):
        dr.TrainState()  # type: ignore[call-arg]


def test_two_states_share_no_mapping() -> None:
    one, other = dr.TrainState(0), dr.TrainState(0)
    one.spectra["q"] = (1.0,)  # type: ignore[index]
    one.sites["q"] = SITE  # type: ignore[index]
    assert other == dr.TrainState(0)


def test_a_site_is_by_itself_and_one_matrix_unless_it_says_otherwise() -> None:
    alone = SiteState(LOW, 4, 0.8, 0.2)
    assert (alone.groups, alone.sharing) == (1, ())
    assert Decision({"q": LOW}).reasons == ()


def test_a_function_of_the_state_is_a_schedule_and_each_kind_of_answer_a_setting() -> None:
    """A join hands a state on to whichever part's turn it is, and the answer back as it is."""
    answers: list[Setting] = [LOW, {"q": FULL}, DECISION]
    parts: list[Schedule] = [lambda state, answer=answer: answer for answer in answers]  # type: ignore[misc]
    joined = dr.schedules.join(parts, [1, 2])
    assert [joined(dr.TrainState(epoch)) for epoch in range(3)] == answers


def test_values_and_schedules_need_no_torch() -> None:
    """They can be made, asked and compared where torch is not even loaded."""
    code = """
import sys
from dynrank_fx.schedules import SiteState, TrainState, auto
from dynrank_fx.phase import Phase
sites = {"w": SiteState(Phase.FULL, 2, 0.9, 0.3)}
auto(0.75)(TrainState(0, 10, 0.1, {"w": (1.0, 0.5)}, 0.0, (0.1,) * 10, sites))
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
