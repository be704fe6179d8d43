"""Numbers of things in words, and JSON that every reader takes: Python would write NaN, which is none."""

from __future__ import annotations

import json
from typing import Any

from dynrank_fx.text import counted, finite, json_text


def refused(name: str) -> Any:
    raise AssertionError(name)


def test_what_is_not_finite_is_nothing_in_json() -> None:
    inf = float("inf")
    value = {"a": [1.5, -inf, (2, float("nan"))], "b": {"c": inf}, "d": "nan", "e": None, "f": True}
    assert json.loads(json_text(value), parse_constant=refused) == {
        "a": [1.5, None, [2, None]],
        "b": {"c": None},
        "d": "nan",
        "e": None,
        "f": True,
    }
    assert finite(value)["d"] == "nan"


def test_one_is_told_in_the_singular() -> None:
    assert [counted(count, "step") for count in (0, 1, 2)] == ["0 steps", "1 step", "2 steps"]
    assert [counted(count, "batch", "batches") for count in (1, 3)] == ["1 batch", "3 batches"]
