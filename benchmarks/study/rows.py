"""Rows of runs that are done, a line of JSON each, by the cell that they are of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

C = TypeVar("C")


def rows_in(path: Path, kind: type[C]) -> dict[C, dict[str, Any]]:
    """kind: of the cells, a frozen dataclass whose fields a row has; none where there is no file."""
    if not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {kind(*(row[name] for name in kind.__dataclass_fields__)): row for row in rows}  # type: ignore[attr-defined]
