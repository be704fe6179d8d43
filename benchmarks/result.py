"""The one format of results: a table, and on what and how it was measured. As JSON and as Markdown."""

from __future__ import annotations

import datetime
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import onnxruntime
import torch

from dynrank_fx.timing import device, threads_said

Cell: TypeAlias = str | int | float | None


@dataclass(frozen=True)
class Column:
    """unit: what stands behind each number. spec: how a number is written, in the language of ``format``."""

    name: str
    unit: str = ""
    spec: str = ""

    def written(self, cell: Cell) -> str:
        """The cell as text. A string stands as it is, and None for what was not measured."""
        if cell is None or isinstance(cell, str):
            return cell or ""
        return f"{cell:{self.spec}} {self.unit}".rstrip()


@dataclass(frozen=True)
class Table:
    """What a benchmark returns. rows: a cell for each column; numbers in the column's unit. note: what a reader has to
    know besides, as sentences.
    """

    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"a row of {len(row)} cells in a table of {len(self.columns)} columns: {row}")

    def markdown(self) -> str:
        head = [column.name for column in self.columns]
        body = [[column.written(cell) for column, cell in zip(self.columns, row, strict=True)] for row in self.rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *body))


@dataclass(frozen=True)
class Result:
    """A table with where it comes from. versions: of torch, onnxruntime and Python. date: as in 2026-11-24, of the end
    of the measurement. command: what was run.
    """

    name: str
    description: str
    command: str
    date: str
    machine: str
    versions: dict[str, str]
    table: Table

    def markdown(self) -> str:
        """A section: what it is, the table, and a line on how and where it was measured."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        parts = [f"## {self.name}", self.description, self.table.markdown(), self.table.note]
        parts.append(f"`{self.command}`, {self.date}; {self.machine}; {versions}")
        return "\n\n".join(part for part in parts if part)

    def to_json(self) -> dict[str, Any]:
        """Flat: the table's columns, rows and note stand beside the rest."""
        fields = asdict(self)
        table = fields.pop("table")
        return {**fields, **table}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Result:
        columns = tuple(Column(**column) for column in data["columns"])
        table = Table(columns, tuple(tuple(row) for row in data["rows"]), data["note"])
        return cls(**{name: data[name] for name in cls.__dataclass_fields__ if name != "table"}, table=table)


def measured_here(name: str, description: str, table: Table, command: str) -> Result:
    """The result of a table that was measured just now, on this machine."""
    versions = {
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
        "Python": platform.python_version(),
    }
    where = f"{device()}, {threads_said(torch.get_num_threads())}"
    return Result(name, description, command, datetime.date.today().isoformat(), where, versions, table)


def save(result: Result, folder: Path) -> Path:
    """Write NAME.json, a row on a line, so that a change of a row is a line of a diff."""
    folder.mkdir(parents=True, exist_ok=True)
    data = result.to_json()
    lists = {name: data.pop(name) for name in ("columns", "rows")}
    lines = [f"{json.dumps(key)}: {_line(value)}" for key, value in data.items()]
    for name, values in lists.items():
        lines.append(f'"{name}": [\n  ' + ",\n  ".join(map(_line, values)) + "\n ]")
    path = folder / f"{result.name}.json"
    path.write_text("{\n " + ",\n ".join(lines) + "\n}\n", encoding="utf-8")
    return path


def load(path: Path) -> Result:
    return Result.from_json(json.loads(path.read_text(encoding="utf-8")))


def load_all(folder: Path, order: Sequence[str]) -> list[Result]:
    """The results of a folder, in this order of their names; names that it does not tell come last."""
    found = [load(path) for path in sorted(folder.glob("*.json"))]
    return sorted(found, key=lambda each: order.index(each.name) if each.name in order else len(order))


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
