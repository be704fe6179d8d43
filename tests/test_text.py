"""JSON that every reader takes: Python would write NaN, which is none."""

from __future__ import annotations

import json
from typing import Any

from dynrank_fx.text import finite, json_text


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
