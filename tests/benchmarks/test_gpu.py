"""The script for a lent GPU, on whatever there is here: rows are kept as they come, and none stops the others."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import benchmarks.gpu
from benchmarks.gpu import TINY, Item, Row, Sizes, attributed, items, main, role_of, run, shapes


def kept(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_most_telling_rows_come_first_and_all_are_there() -> None:
    names = [item.name for item in items(Sizes())]
    assert names[:3] == ["products", "block", "step"]
    assert names[-1] == "tests"
    assert names.count("block") == 4 * 2 + 1, "each width at each number of tokens, and one by another recipe"
    assert sum(item.seconds for item in items(Sizes())[:9]) < 570


def test_what_there_is_no_time_for_is_said(tmp_path: Path) -> None:
    run(tmp_path / "rows", 0.0, TINY)
    machine, *rows = kept(tmp_path / "rows")
    assert machine["item"] == "machine"
    assert len(rows) == len(items(TINY))
    assert all("left out" in row for row in rows)


def test_a_row_that_fails_is_said_and_the_others_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def some() -> Iterator[Row]:
        yield {"a": 1}
        raise RuntimeError("out of memory")

    both = [Item("first", 0, some), Item("second", 0, lambda: iter([{"b": 2}]))]
    monkeypatch.setattr(benchmarks.gpu, "items", lambda sizes: both)
    run(tmp_path / "rows", 100, TINY)
    found = [(row["item"], row.get("a"), row.get("b"), row.get("failed")) for row in kept(tmp_path / "rows")[1:]]
    failed = ("first", None, None, "RuntimeError: out of memory")
    assert found == [("first", 1, None, None), failed, ("second", None, 2, None)]


def test_products_of_all_roles_stand_beside_their_floors() -> None:
    first, *rows = benchmarks.gpu.products(TINY)
    assert min(first["reached"].values()) > 0
    assert [row["role"] for row in rows] == list(shapes(32, 16, 4))
    assert all(row["over floor"] == pytest.approx(row["us"] / row["floor us"]) for row in rows)


def test_the_products_are_those_of_autograd() -> None:
    """Their FLOPs, as torch counts them of y = L (R x), forward and back."""
    from torch.utils.flop_counter import FlopCounterMode

    t, d, r = 10, 6, 2
    x = torch.randn(t, d, requires_grad=True)
    right, left = nn.Linear(d, r, bias=False), nn.Linear(r, d, bias=False)
    with FlopCounterMode(display=False) as counter:
        left(right(x)).sum().backward()
    low = [2 * math.prod(shape) for role, shape in shapes(t, d, r).items() if "dense" not in role]
    assert counter.get_total_flops() == sum(low)


@pytest.mark.parametrize(
    ("shapes", "role"),
    [
        ([[32, 64], [64, 16]], "h, dh"),
        ([[32, 16], [16, 64]], "y, dx"),
        ([[64, 32], [32, 16]], "dL, dR"),
        ([[16, 32], [32, 64]], "dL, dR"),
        ([[64], [32, 16], [16, 64], [], []], "y, dx"),
        ([[32, 64], [64, 256]], "dense"),
    ],
)
def test_a_product_is_known_by_its_shapes(shapes: list[list[int]], role: str) -> None:
    assert role_of("aten::addmm" if len(shapes) > 2 else "aten::mm", shapes, tokens=32, rank=16) == role
    assert role_of("aten::bmm", shapes, tokens=32, rank=16) is None


def test_all_of_the_time_is_of_some_kind() -> None:
    layers = nn.Sequential(nn.Linear(64, 16, bias=False), nn.Linear(16, 64, bias=False), nn.LayerNorm(64))
    x = torch.randn(32, 64, requires_grad=True)
    found, total = attributed(lambda: layers(x).square().sum().backward(), tokens=32, rank=16, times=1)
    assert sum(found.values()) == pytest.approx(total)
    assert min(found[role] for role in ("h, dh", "y, dx", "dL, dR")) > 0
    assert found["dense"] == 0


def test_the_switch_there_and_back_is_measured() -> None:
    rows = list(benchmarks.gpu.switch(TINY))
    assert [row["to"] for row in rows] == ["LOW", "FULL", "LOW", "FULL"]
    assert all(row["s"] > 0 for row in rows)


def test_cuts_at_once_are_measured_beside_cuts_one_by_one() -> None:
    rows = list(benchmarks.gpu.together(TINY))
    assert [row["cut"] for row in rows] == ["anew", "from the last"]
    assert all(row["at once"] > 0 for row in rows)


@pytest.mark.fuzz
def test_the_script_runs(tmp_path: Path) -> None:
    out = tmp_path / "rows"
    main(["--tiny", "--seconds", "100000", "--out", str(out)])
    rows = kept(out)
    assert not [row for row in rows if "failed" in row and row["item"] != "tests"]
    assert {row["item"] for row in rows} == {"machine", *(item.name for item in items(TINY))}
    (captured,) = [row for row in rows if row["item"] == "captures"]
    assert (captured["graphs"], captured["more when they come again"]) == (3, 0)
