"""The pictures of the page of findings are drawn from the files of results."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import pictures
from benchmarks.study.narrower import DENSE, LOW


def test_every_picture_of_the_page_is_drawn(tmp_path: Path) -> None:
    pictures.main(tmp_path)
    page = (Path(pictures.HERE).parent / "docs/findings.md").read_text(encoding="utf-8")
    drawn = sorted(path.name for path in tmp_path.iterdir())
    assert len(drawn) == 3
    assert all(f"images/{name}" in page for name in drawn)


def test_each_way_counts_at_its_best_rate() -> None:
    rows = [
        {"way": way, "seed": 0, "loss": loss} for way, loss in ((LOW, 2.0), (LOW, 1.5), (DENSE, 1.25), (DENSE, 3.0))
    ]
    assert pictures._best(rows, LOW, 0) - pictures._best(rows, DENSE, 0) == pytest.approx(0.25)
    assert pictures._seeds([*rows, {"way": LOW, "seed": 1, "loss": 1.0}], LOW) == [0]
