"""The benchmarks: each is in the list, those that are cheap run, and the results that are kept are of the list."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from benchmarks.result import load
from benchmarks.run import BENCHMARKS, RESULTS, main, run

NAMES = [
    "steps",
    "switch",
    "layers",
    "shares",
    "factor-steps",
    "beside",
    "held",
    "memory",
    "several",
    "peak",
    "truncation",
    "captures",
    "startup",
    "scale",
    "shared",
    "sites",
    "onnx",
    "stacked",
    "stack-steps",
    "large",
    "phases",
    "study",
    "cutting",
    "narrower",
    "finetune",
    "rivals",
    "pitch",
    "neighbours",
]
LONG = ("peak", "several", "sites", "stacked", "stack-steps")  # for make fuzz
CHEAP = (
    "held",
    "factor-steps",
    "peak",
    "several",
    "truncation",
    "startup",
    "scale",
    "sites",
    "stacked",
    "stack-steps",
    "phases",
)
BY_NAME = {benchmark.name: benchmark for benchmark in BENCHMARKS}


def test_every_benchmark_is_listed_with_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--list"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == NAMES
    assert all(re.fullmatch(r"[A-Z][^.]+(\.[a-z][^.]+)*\.", benchmark.description) for benchmark in BENCHMARKS)


@pytest.mark.parametrize(
    "name", [name if name not in LONG else pytest.param(name, marks=pytest.mark.fuzz) for name in CHEAP]
)
def test_a_benchmark_measures(name: str) -> None:
    result = run(BY_NAME[name], quick=True)
    assert result.command == f"python benchmarks/run.py {name} --quick"
    assert result.table.rows
    numbers = [cell for row in result.table.rows for cell in row if isinstance(cell, float)]
    assert numbers or name == "several"  # whose cells say units
    assert all(math.isfinite(number) for number in numbers)


def test_a_result_is_kept_where_it_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["startup", "--quick", "--save", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    main(["--tables", "--out", str(tmp_path)])
    assert capsys.readouterr().out.strip() == printed.strip() == load(tmp_path / "startup.json").markdown()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "name a benchmark, or give --list or --tables"),
        (["steps", "stairs"], "there is no benchmark 'stairs': choose from steps, switch"),
        (["steps", "--quick", "--save"], "what --quick measures is no result: give --out another folder"),
    ],
)
def test_what_is_refused(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_a_kept_result_is_of_a_benchmark(path: Path) -> None:
    result = load(path)
    assert result.name == path.stem
    assert result.name in NAMES
    assert result.description == BY_NAME[result.name].description
    assert result.command == f"python benchmarks/run.py {result.name}"
    assert set(result.versions) == {"torch", "onnxruntime", "Python"}
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", result.date)
