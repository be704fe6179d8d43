"""The format of results: what is written is read again as it was, and printed with where it comes from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.result import Column, Result, Table, load, load_all, measured_here, save

TABLE = Table(
    (Column("model"), Column("size", spec=","), Column("time", "ms", ".1f"), Column("ratio", spec=".2f")),
    (("a", 1234, 5.678, 1.0), ("b", 5, None, 0.5)),
    "Two of them.",
)
RESULT = Result("sizes", "How large.", "python x.py", "2026-11-24", "a machine", {"torch": "2.13.0"}, TABLE)


def test_a_result_survives_its_file(tmp_path: Path) -> None:
    path = save(RESULT, tmp_path / "new")
    assert path == tmp_path / "new" / "sizes.json"
    assert load(path) == RESULT
    expected = {"name", "description", "command", "date", "machine", "versions", "note", "columns", "rows"}
    assert set(json.loads(path.read_text())) == expected


def test_a_row_is_a_line_of_the_file(tmp_path: Path) -> None:
    assert '  ["b", 5, null, 0.5]\n' in save(RESULT, tmp_path).read_text()


def test_a_result_as_markdown() -> None:
    assert RESULT.markdown() == (
        "## sizes\n\nHow large.\n\n"
        "| model | size | time | ratio |\n| --- | --- | --- | --- |\n"
        "| a | 1,234 | 5.7 ms | 1.00 |\n| b | 5 |  | 0.50 |\n\n"
        "Two of them.\n\n`python x.py`, 2026-11-24; a machine; torch 2.13.0"
    )


def test_what_is_no_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a row of 1 cells in a table of 4 columns"):
        Table(TABLE.columns, (("a",),))
    broken = measured_here("x", "", Table((Column("time"),), ((float("nan"),),)), "")
    with pytest.raises(ValueError, match="JSON compliant"):
        save(broken, tmp_path)
    assert not list(tmp_path.iterdir())


def test_results_come_in_the_order_of_the_list(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        save(measured_here(name, "", TABLE, ""), tmp_path)
    assert [each.name for each in load_all(tmp_path, ["c", "a"])] == ["c", "a", "b"]
