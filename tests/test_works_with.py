"""The table of what works with what: every line has a verdict, and a test that is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from benchmarks.result import load
from benchmarks.run import RESULTS

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "works-with.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (.+) \| (.+) \| `([\w/]+\.py)::(\w+)` \|$", PAGE, flags=re.MULTILINE)


@pytest.mark.parametrize(("what", "verdict", "file", "name"), ROWS, ids=[row[3] for row in ROWS])
def test_a_line_has_a_verdict_and_its_test(what: str, verdict: str, file: str, name: str) -> None:
    assert verdict.startswith(("works", "refused", "a warning", "listed")), what
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_every_line_was_read() -> None:
    lines = [line for line in PAGE.splitlines() if line.startswith("| ") and "::" in line]
    assert len(ROWS) == len(lines) > 40


def test_the_table_beside_other_tools_is_the_one_that_was_measured() -> None:
    result = load(RESULTS / "neighbours.json")
    assert result.table.markdown() in PAGE
    assert f"`{result.command}`" in PAGE
