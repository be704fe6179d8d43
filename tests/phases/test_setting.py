"""What a setting says of each site: a phase, phases by pattern, or a decision with its reasons."""

from __future__ import annotations

import pytest

import dynrank_fx as dr
from dynrank_fx.phases import phases_in
from dynrank_fx.schedules import Decision, Setting

FULL, LOW, ADAPTOR = dr.Phase.FULL, dr.Phase.LOW, dr.Phase.ADAPTOR
NAMES = ("a.weight", "b.0.weight", "b.1.weight")


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        (LOW, {"a.weight": LOW, "b.0.weight": LOW, "b.1.weight": LOW}),
        (int(LOW), {"a.weight": LOW, "b.0.weight": LOW, "b.1.weight": LOW}),
        ({}, {}),
        ({"b.0.weight": ADAPTOR}, {"b.0.weight": ADAPTOR}),
        ({"b.*": LOW}, {"b.0.weight": LOW, "b.1.weight": LOW}),
        ({"*": LOW, "b.1.weight": FULL}, {"a.weight": LOW, "b.0.weight": LOW, "b.1.weight": FULL}),
        (Decision({"*": FULL, "a.weight": LOW}), {"a.weight": LOW, "b.0.weight": FULL, "b.1.weight": FULL}),
        (Decision({}, ("nothing changes",)), {}),
    ],
    ids=str,
)
def test_the_phase_of_every_site_that_is_named(setting: Setting, expected: dict[str, dr.Phase]) -> None:
    found = phases_in(setting, NAMES)
    assert found == expected
    assert all(isinstance(phase, dr.Phase) for phase in found.values())


@pytest.mark.parametrize("wrap", [dict, Decision], ids=["a mapping", "a decision"])
def test_what_means_nothing_is_refused_in_words(wrap: type) -> None:
    with pytest.raises(dr.TransitionError, match=r"^the pattern 'c\.\*' matches no site; they are named like a"):
        phases_in(wrap({"c.*": LOW}), NAMES)
    with pytest.raises(dr.TransitionError, match=r"^7 is no phase: give Phase\.LOW, Phase\.FULL or Phase\.ADAPTOR$"):
        phases_in(wrap({"a.weight": 7}), NAMES)
    with pytest.raises(dr.TransitionError, match=r"^'LOW' is no phase"):
        phases_in("LOW", NAMES)  # type: ignore[arg-type]
