"""Plain text for plans and reports: tables, how a size has changed, JSON, and what a terminal may be shown."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Columns as wide as their widest cell, those in ``right`` aligned right; empty columns are left out."""
    keep = [i for i in range(len(head)) if any(row[i] for row in rows)] or list(range(len(head)))
    widths = {i: max(len(str(line[i])) for line in [head, *rows]) for i in keep}

    def line(cells: Sequence[str]) -> str:
        parts = [str(cells[i]).rjust(widths[i]) if i in right else str(cells[i]).ljust(widths[i]) for i in keep]
        return "  ".join(parts).rstrip()

    rule = "  ".join("-" * widths[i] for i in keep)
    return "\n".join([line(head), rule, *(line(row) for row in rows)])


def counted(count: int, one: str, more: str | None = None) -> str:
    """So many of something: ``1 step``, ``2 steps``. more: where its plural has no mere s at the end."""
    return f"{count} {one if count == 1 else more or one + 's'}"


def change(before: int, after: int) -> str:
    """Both sizes, and the second as a share of the first, which is the dense model's."""
    return f"{before:,} -> {after:,} ({after / before:.1%} of dense)" if before else "0"


def printable(text: str) -> str:
    """The text with the control characters that a terminal obeys, other than tabs and new lines, spelt out."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: ascii(found[0])[1:-1], text)


def rounded(value: float, digits: int) -> float:
    """The value in so many digits, which are all that a file has of it then."""
    return float(f"{value:.{digits}g}")


def finite(value: Any) -> Any:  # Any: whatever JSON holds, and what the user noted
    """The value with None for each number that is not finite, as JSON has none, and with lists for tuples."""
    if isinstance(value, Mapping):
        return {name: finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def json_text(value: object) -> str:
    """The value as JSON that every reader takes."""
    return json.dumps(finite(value), indent=1, allow_nan=False)
