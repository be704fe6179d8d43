"""The study: every method keeps to the budget and ends as it should, and the tables say what the rows say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import dynrank_fx as dr
from benchmarks.study import cells, cutting, methods, scenes, tables
from benchmarks.study.guard import SpectralGuard
from benchmarks.study.tasks import TASKS
from dynrank_fx.rewrite import switched_modules

COSTS = {dr.Phase.FULL: 1.0, dr.Phase.LOW: 0.4, dr.Phase.ADAPTOR: 1.05}


def test_at_equal_compute_every_method_takes_the_budget_and_no_more() -> None:
    ends = {"dense": dr.Phase.FULL, methods.NARROWER: dr.Phase.FULL, "paper, adaptor": dr.Phase.ADAPTOR}
    for name, way in methods.METHODS.items():
        if name.startswith("auto"):
            continue
        epochs = methods.epochs_within(name, 12, COSTS, 12 * methods.COST)
        schedule = way(epochs, COSTS).schedule
        phases = [schedule(dr.TrainState(epoch, epochs)) for epoch in range(epochs)]
        spent = sum(COSTS[phase] for phase in phases)
        assert 12 * methods.COST - 2.1 < spent <= 12 * methods.COST + 1e-9, name
        assert phases[-1] is ends.get(name, dr.Phase.LOW), name


def test_every_row_that_is_kept_is_of_the_grid() -> None:
    assert set(cells.kept()) <= set(cells.cells())


def test_the_narrower_network_takes_the_flops_that_it_is_asked_for() -> None:
    task = TASKS["digits-vit"]
    width, share = task.narrower(dr.Ratio(0.25), 0.4)

    def flops(model: nn.Module) -> int:
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(2, 1, 8, 8))
        return counter.get_total_flops()

    assert width % task.heads == 0
    assert share == pytest.approx(flops(task.model(width)) / flops(task.model()), rel=0.05)
    assert share == pytest.approx(0.4, rel=0.1)


def test_the_wide_network_is_wrn_10_2() -> None:
    def block(i: int, o: int) -> int:
        return 9 * i * o + 9 * o * o + i * o + 2 * i + 2 * o

    net = scenes.WideReader()
    expected = 9 * 16 + block(16, 32) + block(32, 64) + block(64, 128) + 2 * 128 + 10 * 128 + 10
    assert sum(p.numel() for p in net.parameters()) == expected
    assert net(torch.zeros(2, 1, scenes.SIZE, scenes.SIZE)).shape == (2, 10)


def test_the_tables_have_every_row_and_its_mean(tmp_path: Path) -> None:
    def row(method: str, seed: int, metric: float) -> dict[str, Any]:
        return {
            **{"task": "t", "method": method, "rank": 0.25, "compute": "equal compute", "seed": seed, "epochs": 2},
            **{"dense_epochs": 4, "metric": metric, "loss": 1.0, "truncated": metric - 0.1, "truncated_loss": 1.5},
            **{"spent": 0.4, "phases": ["FULL", "LOW"], "metrics": [0.1, metric], "effective_rank": [9.0, 3.0]},
            **{"params": [100, 40], "reasons": [[], []], "seconds": 1.0, "machine": "m"},
        }

    rows = [row("a", 0, 0.5), row("a", 1, 0.6), row("b", 0, 0.7)]
    phases = {"t": {"FULL": 1.0, "LOW": 0.5, "ADAPTOR": 1.1}}
    of = {"t": {name: {"flops": v, "time": v, "bytes": v, "peak": v} for name, v in phases["t"].items()}}
    tables.write_results(rows, of, tmp_path)
    text = (tmp_path / "RESULTS.md").read_text()
    first = "| a | 2 | 2 | 0.40 | 0.38 | 1.00 | 55.00 ± 7.07 % | 45.00 ± 7.07 % | 1.5000 | 9 → 3 | 40 | FL |"
    assert first in text
    assert "| b | 1 | 2 | 0.40 | 0.38 | 1.00 | 70.00 % | 60.00 % |" in text
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")
    assert (
        "| t | 0.25 | equal compute | a | 2 | 0.40 | 55.00 % | 7.07 | 45.00 % | 7.07 |"
        in tables.summary(rows).markdown()
    )


def test_the_guard_holds_the_spectral_norm_after_a_switch() -> None:
    torch.manual_seed(0)
    net = dr.transform(
        torch.nn.Sequential(torch.nn.Linear(16, 16, bias=False)), (torch.randn(4, 16),), rank=dr.Fixed(4)
    )
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    guard = SpectralGuard(net, optimizer)
    dr.enter_(net, dr.Phase.LOW, optimizer)
    site = next(iter(switched_modules(net).values()))[0]
    before = float(torch.linalg.matrix_norm(site.weight.detach(), 2))
    for _ in range(3):
        optimizer.zero_grad()
        (-net(torch.eye(16)).square().sum()).backward()
        optimizer.step()
        assert float(torch.linalg.matrix_norm(site.weight.detach(), 2)) == pytest.approx(before, rel=1e-5)
    assert len(guard.grown) == 3


def test_a_cell_trains() -> None:
    """The smallest there is, in two epochs."""
    row = cells.train(cells.Cell("digits-vit", "auto", 0.25, "equal epochs", 7), epochs=2)
    assert row["phases"][0] == "FULL"
    assert row["spent"] <= 0.75
    assert len(row["metrics"]) == row["epochs"] == row["dense_epochs"] == 2
    json.dumps(row)


def test_a_cell_that_is_kept_is_not_trained_again() -> None:
    cell, row = next((cell, row) for cell, row in cells.kept().items() if cell.task == "digits-vit")
    assert cells.train(cell) == row


def test_the_table_of_cuts_has_every_way_and_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cutting, "HERE", tmp_path)
    found = []
    for seed, t, training in ((s, *each) for s in (0, 1) for each in enumerate(cutting.TRAININGS)):
        point = {"task": "net", "seed": seed, "training": training, "params": 1000, "accuracy": 0.9}
        timed = {"latency": 1.0} if seed == 0 else {}
        found.append({**point, **timed, "way": "", "ratio": None})
        for ratio in cutting.RATIOS:
            timed = {"latency": ratio} if seed == 0 else {}
            for w, way in enumerate(cutting.WAYS):
                known = {"ratio": ratio, "params": int(1000 * ratio), "accuracy": 0.1 * t + 0.01 * w + 0.02 * seed}
                found.append({**point, **timed, "way": way, **known})
    cutting.write(found)
    text = (tmp_path / "CUTTING.md").read_text()
    assert "| dense | 0.12 | 1.00 ± 1.41 % (0.12) | 2.00 ± 1.41 % (0.12) | 3.00 ± 1.41 % (0.12) |" in text
    assert "| LOW (rank 1/4) | 0.50 | 31.00 ± 1.41 % (0.50) | 32.00 ± 1.41 % (0.50) |" in text
    assert "1.00 to 1.00 on net" in text
    assert (tmp_path / "cutting-net.png").read_bytes().startswith(b"\x89PNG")
    line = "| net | 2 | dense | 0.12 | 90.00 % | 1.00 % | 2.00 % | 3.00 % | 4.00 % | 5.00 % |"
    assert line in cutting.summary(found).markdown()
