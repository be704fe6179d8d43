"""The table that is committed: a summary, a row per model, why matrices stay dense, and what failed."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]

_STAGES = ("start", "model", "model in float64", "capture", "transform", "plan", "parity", "low", "truncate", "onnx")


def write_results(rows: list[Row], path: Path) -> None:
    rows = sorted(rows, key=lambda row: (row["source"], row["family"], row["name"]))
    parts = [_head(rows), _summary(rows), _families(rows), _models(rows), _reasons(rows), _notes(rows), _failures(rows)]
    path.write_text("\n\n".join(part for part in parts if part) + "\n")


def _head(rows: list[Row]) -> str:
    seconds = sum(row["seconds"] for row in rows)
    return (
        "# The zoo\n\n"
        "Written by `make zoo` (`python tests/zoo/run.py`): real architectures, weights random and perturbed, small "
        f"inputs; torch {torch.__version__}, {seconds / 60:.0f} minutes in all. Coverage is the share of parameters "
        "of all matrices that are in sites. FULL is compared bit for bit; LOW at full rank, in float64, with the "
        "original; the truncated model at half the rank, in float64, with the net in LOW, on another batch; the ONNX "
        "file, of the truncated model in float32, with onnxruntime on batches of 1, 2 and 5, to 1e-4 of the largest "
        "value or ten times what float32 alone makes of the output. Rows are kept from run to run, so that they may be "
        "of versions that differ a little."
    )


def _summary(rows: list[Row]) -> str:
    sources = sorted({row["source"] for row in rows})
    checks = {
        "captured and transformed": ("", lambda row: "sites" in row),
        "FULL: outputs in eval mode bit-equal": ("parity", lambda row: row.get("full_eval")),
        "FULL: outputs in train mode bit-equal": ("parity", lambda row: row.get("full_train")),
        "FULL: gradients and buffers of a step bit-equal": ("parity", lambda row: row.get("full_grads")),
        "LOW at full rank agrees": ("low", lambda row: "low" in row and not _failed(row, "low")),
        "truncated agrees with LOW": ("truncate", lambda row: "truncate" in row and not _failed(row, "truncate")),
        "ONNX agrees": ("onnx", lambda row: "onnx" in row),
        "ONNX with a free batch": ("onnx", lambda row: row.get("onnx_free")),
    }
    groups = [[row for row in rows if row["source"] == source] for source in sources] + [rows]
    lines = [["models", *map(len, groups)]]
    for what, (step, holds) in checks.items():
        line = [what]
        for group in groups:
            ran = [row for row in group if not step or step in row["steps"]]
            line.append(f"{sum(bool(holds(row)) for row in ran)} of {len(ran)}")
        lines.append(line)
    lines.append(["no failure", *(sum(not row["failures"] for row in group) for group in groups)])
    covered = [[row for row in rows if row["source"] == source and "sites" in row] for source in sources]
    lines.append(
        ["coverage, all matrices", *map(_coverage, covered), _coverage(row for some in covered for row in some)]
    )
    return "## Summary\n\nOf as many models as that check was run on.\n\n" + _table(["", *sources, "all"], lines)


def _families(rows: list[Row]) -> str:
    families: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        if "sites" in row:
            families[row["source"], row["family"]].append(row)
    lines = []
    for (source, family), members in families.items():
        least = min(members, key=_share)
        lines.append([source, family, len(members), _coverage(members), f"{_share(least):.0%}", least["name"]])
    lines.sort(key=lambda line: float(line[4].rstrip("%")))
    head = ["source", "family", "models", "coverage", "floor", "model at the floor"]
    return (
        "## Coverage by family\n\nThe least covered first; the floor is the least of any model of the family.\n\n"
        + _table(head, lines)
    )


def _models(rows: list[Row]) -> str:
    head = ["model", "capture", "sites", "dense", "coverage", "FULL", "LOW", "truncated", "ONNX", "inert", "s"]
    lines = []
    for row in rows:
        full = "/".join(_mark(row.get(f"full_{what}")) for what in ("eval", "train", "grads"))
        onnx = _error(row, "onnx") + (" (one batch)" if row.get("onnx_free") is False else "")
        lines.append(
            [
                f"{row['source']} {row['name']}",
                row.get("capture", ""),
                row.get("sites", ""),
                len(row["skipped"]) if "skipped" in row else "",
                f"{_share(row):.0%}" if "sites" in row else "",
                full if "full_eval" in row else "",
                _error(row, "low"),
                _error(row, "truncate"),
                onnx,
                len(row.get("insensitive", ())) or "",
                f"{row['seconds']:.0f}",
            ]
        )
    text = (
        "FULL: outputs in eval mode, in train mode, gradients and buffers. LOW, truncated, ONNX: the largest error "
        "over the largest value. Inert: matrices that the output does not depend on, of which the figures say nothing."
    )
    return f"## Models\n\n{text}\n\n{_table(head, lines)}"


def _reasons(rows: list[Row]) -> str:
    matrices: Counter[str] = Counter()
    params: Counter[str] = Counter()
    models: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        for _name, size, reason in row.get("skipped", ()):
            key = normalised(reason)
            matrices[key] += 1
            params[key] += size
            if row["name"] not in models[key]:
                models[key].append(row["name"])
    lines = [
        [reason, matrices[reason], f"{params[reason]:,}", len(models[reason]), ", ".join(models[reason][:3])]
        for reason in sorted(params, key=lambda reason: -params[reason])
    ]
    return "## Why matrices stay dense\n\n" + _table(["reason", "matrices", "parameters", "models", "such as"], lines)


def _notes(rows: list[Row]) -> str:
    """What was checked less strictly, or could not be: by its own row, with the reason."""
    kinds = {
        "float32": "LOW and truncated in float32, to 1e-3 and 1e-4",
        "batch": "truncated on the example's batch size alone",
        "rounding": "ONNX to ten times what float32 alone makes of the output",
    }
    lines = [
        [f"{row['source']} {row['name']}", words, f"{row[key]:.0e}" if key == "rounding" else row[key]]
        for row in rows
        for key, words in kinds.items()
        if (row.get(key, 0) > 1e-5 if key == "rounding" else key in row)
    ]
    if not lines:
        return ""
    return "## Checked less strictly\n\n" + _table(["model", "how", "why"], lines)


def _failures(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        for i, failure in enumerate(row["failures"]):
            whose = row.get("original", "") if i + 1 == len(row["failures"]) else ""
            lines.append((_STAGES.index(failure["stage"]), f"{row['source']} {row['name']}", failure, whose))
    lines.sort(key=lambda line: line[:2])
    tally = Counter(failure["stage"] for _, _, failure, _ in lines)
    counted = ", ".join(f"{stage}: {tally[stage]}" for stage in _STAGES if tally[stage])
    table = [[f["stage"], name, f["error"], whose] for _, name, f, whose in lines]
    body = _table(["stage", "model", "cause", "the original without us"], table) if table else "None."
    return f"## Failures\n\n{counted}\n\n{body}" if table else f"## Failures\n\n{body}"


def normalised(text: str) -> str:
    """A reason without the names and numbers of one model."""
    text = re.sub(r"inside the (\w+) \S+?:", r"inside the \1 …:", text)
    text = re.sub(r"the weight of \S+ is", "the weight of … is", text)
    return re.sub(r"\d[\d,.x]*\d|\d", "N", text)


def _failed(row: Row, stage: str) -> bool:
    return any(failure["stage"] == stage for failure in row["failures"])


def _error(row: Row, stage: str) -> str:
    if _failed(row, stage):
        return f"**{row[stage]:.0e}**" if stage in row else "**fails**"
    return f"{row[stage]:.0e}" if stage in row else ""


def _mark(value: bool | None) -> str:
    return "=" if value else "**≠**"


def _share(row: Row) -> float:
    return row["site_params"] / row["matrix_params"] if row["matrix_params"] else 1.0


def _coverage(rows: Iterable[Row]) -> str:
    rows = list(rows)
    total = sum(row["matrix_params"] for row in rows)
    return f"{sum(row['site_params'] for row in rows) / total:.1%}" if total else ""


def _table(head: list[Any], lines: Iterable[Iterable[Any]]) -> str:
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    shown = [head, ["---"] * len(head), *cells]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in shown)
