"""The study's rows as tables and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

Row = dict[str, Any]


def write_results(rows: list[Row], flops: dict[str, dict[str, float]], folder: Path) -> None:
    pass
