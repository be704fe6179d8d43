"""Dynamic-rank training as a torch.fx compiler pass: factor, train in phases, truncate, export (arXiv 2508.08625).

The names are imported when first used, so that ``import dynrank_fx`` costs nothing before torch is needed. Which names
there are, and where each comes from, stands in ``__init__.pyi``, for type checkers and for this file alike.
"""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

_HOME = {
    alias.name: node.module
    for node in ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8")).body
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    room = _HOME[name]
    # A name without a room is a room itself.
    value = importlib.import_module(f".{room or name}", __name__)
    if room:
        value = getattr(value, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
