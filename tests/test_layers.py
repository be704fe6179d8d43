"""A module imports only from rows above it: LEVELS is the architecture of the package, kept by this test."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEVELS = (
    "batchnorms bench errors lowrank lrplan multilinear onnxmemory origin phase products randomness table",
    "auto convolutions inputs net precision ranks rewarm scopes statetree store",
    "budget dynamic exported onnxconvert ops sameness schedules",
    "batches factorlayout onnxcheck onnxfile onnxinputs recognize sites weightviews",
    "calls onnxdiff recovery symbolic tensorlayouts twofactors",
    "convlayout locate matrixlayout",
    "interpret layout piecewise roles",
    "finding moments optim overrides plan switched tokens tracing",
    "calibration decay inlining onnxsite packs parameters rewrite setting",
    "export landing planning presets sitetimes task values",
    "checkpoint modeltimes onnxbench pipeline report reranking transition",
    "plots state truncation",
    "candidates compressed phases runplots",
    "compression page train",
    "progress runfile",
    "cli.modelfile",
    "cli.options cli.runs cli.stopping cli.training",
    "cli.bench cli.compress cli.export cli.inspect cli.report cli.train cli.transform cli.verify",
    "cli.main",
    "cli.__main__",
)
LEVEL = {module: level for level, row in enumerate(LEVELS) for module in row.split()}
FILES = {path.stem: path for path in (ROOT / "dynrank_fx").glob("*.py")}
FILES |= {f"cli.{path.stem}": path for path in (ROOT / "cli").glob("*.py")}


def imports(module: str) -> set[str]:
    """The modules of the package that a module names in any import, those for type checking and in functions too."""
    found = set()
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            base = {0: "", 1: "dynrank_fx.cli." if module.startswith("cli.") else "dynrank_fx."}[node.level]
            names = [
                f"{base}{node.module or ''}".strip("."),
                *(f"{base}{node.module or ''}.{a.name}" for a in node.names),
            ]
        found |= {
            name.replace("..", ".").removeprefix("dynrank_fx.") for name in names if name.startswith("dynrank_fx")
        }
    return found & FILES.keys()


def test_every_module_has_a_level() -> None:
    assert set(LEVEL) == {module for module in FILES if not module.endswith("__init__")}


@pytest.mark.parametrize("module", LEVEL)
def test_a_module_imports_only_from_levels_above_it(module: str) -> None:
    assert {name for name in imports(module) if LEVEL[name] >= LEVEL[module]} == set()


def test_the_table_is_as_flat_as_the_imports_allow() -> None:
    library = [module for module in LEVEL if not module.startswith("cli.")]
    needed: dict[str, int] = {}
    for module in library:
        needed[module] = max((needed[name] + 1 for name in imports(module) & needed.keys()), default=0)
    assert needed == {module: LEVEL[module] for module in library}
