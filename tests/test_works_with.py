"""The table of what works with what: every line has a verdict, and a test that is there and shows such a thing."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

from benchmarks.result import load
from benchmarks.run import RESULTS

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "works-with.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (.+) \| (.+) \| `([\w/]+\.py)::(\w+)` \|$", PAGE, flags=re.MULTILINE)

# What a test, or what it uses, has that shows the first word of a verdict.
PROVED_BY = {
    "works": ("assert",),
    "listed": ("assert",),
    "refused": ("raises(", "refused"),
    "a warning": ("warns(", "DynrankWarning"),
}


@functools.cache
def functions_of(file: str) -> dict[str, str]:
    text = (TESTS / file).read_text(encoding="utf-8")
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return {node.name: ast.get_source_segment(text, node) or "" for node in nodes}


def source_of(name: str, file: str) -> str:
    """The source of a test and of what it uses of its own file, such as what it starts in other processes."""
    functions, todo, seen = functions_of(file), [name], dict[str, str]()
    while todo:
        each = todo.pop()
        seen[each] = functions[each]
        todo += [other for other in functions if other not in seen and re.search(rf"\b{other}\b", functions[each])]
    return "\n".join(seen.values())


@pytest.mark.parametrize(("what", "verdict", "file", "name"), ROWS, ids=[row[3] for row in ROWS])
def test_a_line_has_a_verdict_and_its_test(what: str, verdict: str, file: str, name: str) -> None:
    (word,) = [word for word in PROVED_BY if verdict.startswith(word)]
    checks = PROVED_BY[word]
    proof = source_of(name, file)
    assert any(each in proof for each in checks), f"{what}: {name} shows nothing of the kind {verdict!r}"


def test_every_line_was_read() -> None:
    lines = [line for line in PAGE.splitlines() if line.startswith("| ") and "::" in line]
    assert len(ROWS) == len(lines) > 40


def test_the_table_beside_other_tools_is_the_one_that_was_measured() -> None:
    result = load(RESULTS / "neighbours.json")
    assert result.table.markdown() in PAGE
    assert f"`{result.command}`" in PAGE
