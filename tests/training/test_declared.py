"""What a resumed run compares: values in words that are the same in every process."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
from several import in_processes

import dynrank_fx as dr
from dynrank_fx.training.declared import said


def a_function(state: dr.TrainState, low: int = 1) -> dr.Phase:
    return dr.Phase.LOW


class AClass:
    """Without a repr of its own."""

    def method(self, state: dr.TrainState) -> dr.Phase:
        return dr.Phase.LOW


@dataclass(frozen=True)
class AValue:
    parts: tuple[Any, ...]
    names: dict[str, Any]


VALUES = {
    "auto": dr.schedules.auto(0.5),
    "phases in it": dr.schedules.FullBetween(1, 2, dr.Phase.ADAPTOR),
    "joined": dr.schedules.join([dr.schedules.always(dr.Phase.LOW), a_function], [3]),
    "a function": a_function,
    "a lambda": lambda state: dr.Phase.LOW,
    "a partial": partial(a_function, low=3),
    "a partial of a method": partial(AClass().method, 1, low=[2]),
    "a method": AClass().method,
    "an object": AClass(),
    "a value of all these": AValue((a_function,), {"x": AClass(), "y": [AClass().method, None]}),
}


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_it_is_the_repr_without_addresses_as_checkpoints_have_it(value: object) -> None:
    """Checkpoints that were written when addresses were cut out of the repr go on."""
    assert said(value) == re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


@dataclass(frozen=True)
class AText:
    """Whose own text looks like an address."""

    text: str


def test_what_only_looks_like_an_address_is_told_apart() -> None:
    assert said(AText("starts at 0x10")) == "AText(text='starts at 0x10')"
    assert said(AText("starts at 0x10")) != said(AText("starts at 0x20"))


def _all_said(rank: int) -> list[str]:
    return [said(value) for value in VALUES.values()]


def test_it_is_the_same_in_another_process() -> None:
    (found,) = in_processes(_all_said, count=1)
    assert found == _all_said(0)
    assert "0x" not in "".join(found)
