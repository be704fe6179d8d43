"""The list of schedules is the command line's, and every schedule on it does what any schedule must."""

from __future__ import annotations

import click
import pytest

import dynrank_fx as dr
from dynrank_fx.cli.train import train
from dynrank_fx.schedules import BY_NAME, Decision, NamedSchedule, SiteState

RUN = {"epochs": 20, "lr_milestones": (10, 15), "low": 2, "full": 1}  # what the command line always knows
OPTIONS = {"cost": 0.7, "low": 3, "full": 2, "last": dr.Phase.ADAPTOR}
by_name = pytest.mark.parametrize("named", BY_NAME, ids=lambda named: named.name)


def told(epoch: int) -> dr.TrainState:
    """All that a schedule can be told, of a site with a flat spectrum."""
    sites = {"w": SiteState(dr.Phase.FULL, 2, 0.9, 0.3)}
    return dr.TrainState(epoch, 20, 0.1, {"w": (1.0,) * 8}, float(epoch) / 2, (0.1,) * 20, sites)


def test_the_command_line_offers_the_list() -> None:
    (option,) = [each for each in train.params if each.name == "schedule"]
    assert isinstance(option.type, click.Choice)
    assert tuple(option.type.choices) == tuple(named.name for named in BY_NAME)
    assert len({named.name for named in BY_NAME}) == len(BY_NAME)


@by_name
def test_what_a_schedule_takes_can_be_given(named: NamedSchedule) -> None:
    options = {each.name for each in train.params}
    assert set(named.takes) <= RUN.keys() | OPTIONS.keys()
    assert set(named.takes) - {"last"} <= options, "each is an option of its name, but for last, which is --deflate"


@by_name
@pytest.mark.parametrize("given", [RUN, RUN | OPTIONS], ids=["its own defaults", "every option"])
def test_a_schedule_is_a_pure_function_to_phases(named: NamedSchedule, given: dict[str, object]) -> None:
    schedule = named(given)
    assert schedule == named(given), "a value that can be compared"
    answers = [schedule(told(epoch)) for epoch in range(20)]
    assert answers == [schedule(told(epoch)) for epoch in reversed(range(20))][::-1]
    for answer in answers:
        phases = answer.phases.values() if isinstance(answer, Decision) else [answer]
        assert all(isinstance(phase, dr.Phase) for phase in phases)


@by_name
def test_an_option_makes_another_schedule_if_it_is_taken_and_none_is_no_option(named: NamedSchedule) -> None:
    plain = named(RUN)
    assert plain == named(RUN | {"cost": None, "last": None})
    for name, value in OPTIONS.items():
        if name == "last" and named.name.startswith("paper"):
            value = dr.Phase.LOW  # theirs is ADAPTOR by itself
        assert (named(RUN | {name: value}) != plain) == (name in named.takes)
