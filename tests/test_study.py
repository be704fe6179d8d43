"""The study: every method keeps to the budget and ends as it should, and the tables say what the rows say."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import dynrank_fx as dr
from dynrank_fx.rewrite import switched_modules

STUDY = Path(__file__).parents[1] / "samples" / "study"
COSTS = {dr.Phase.FULL: 1.0, dr.Phase.LOW: 0.4, dr.Phase.ADAPTOR: 1.05}


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> Any:
    for folder in (STUDY, STUDY.parent):
        monkeypatch.syspath_prepend(str(folder))
    for name in ("cutting", "gpt", "guard", "methods", "results", "run", "tasks"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import run

    return run


def test_at_equal_compute_every_method_takes_the_budget_and_no_more(study):
    methods = sys.modules["methods"]
    for name, way in methods.METHODS.items():
        if name.startswith("auto"):
            continue
        epochs = methods.epochs_within(name, 12, COSTS, 12 * methods.COST)
        schedule = way(epochs, COSTS).schedule
        phases = [schedule(dr.TrainState(epoch, epochs)) for epoch in range(epochs)]
        spent = sum(COSTS[phase] for phase in phases)
        assert 12 * methods.COST - 2.1 < spent <= 12 * methods.COST + 1e-9, name
        assert phases[-1] is {"dense": dr.Phase.FULL, "paper, adaptor": dr.Phase.ADAPTOR}.get(name, dr.Phase.LOW), name


def test_every_row_that_is_kept_is_of_the_grid(study):
    assert set(study.kept()) <= set(study.cells())


def test_the_tables_have_every_row_and_its_mean(study, tmp_path):
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
    sys.modules["results"].write_results(rows, of, tmp_path)
    text = (tmp_path / "RESULTS.md").read_text()
    first = "| a | 2 | 2 | 0.40 | 0.38 | 1.00 | 55.00 ± 7.07 % | 45.00 ± 7.07 % | 1.5000 | 9 → 3 | 40 | FL |"
    assert first in text
    assert "| b | 1 | 2 | 0.40 | 0.38 | 1.00 | 70.00 % | 60.00 % |" in text
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")


def test_the_guard_holds_the_spectral_norm_after_a_switch(study):
    torch.manual_seed(0)
    net = dr.transform(
        torch.nn.Sequential(torch.nn.Linear(16, 16, bias=False)), (torch.randn(4, 16),), rank=dr.Fixed(4)
    )
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    guard = sys.modules["guard"].SpectralGuard(net, optimizer)
    dr.enter_(net, dr.Phase.LOW, optimizer)
    site = next(iter(switched_modules(net).values()))[0]
    before = float(torch.linalg.matrix_norm(site.weight.detach(), 2))
    for _ in range(3):
        optimizer.zero_grad()
        (-net(torch.eye(16)).square().sum()).backward()
        optimizer.step()
        assert float(torch.linalg.matrix_norm(site.weight.detach(), 2)) == pytest.approx(before, rel=1e-5)
    assert len(guard.grown) == 3


def test_a_cell_trains(study, monkeypatch):
    """The smallest there is, in two epochs."""
    from dataclasses import replace

    tasks = sys.modules["tasks"]
    monkeypatch.setitem(tasks.TASKS, "digits-vit", replace(tasks.TASKS["digits-vit"], epochs=2))
    row = study.train(study.Cell("digits-vit", "auto", 0.25, "equal epochs", 7))
    assert row["phases"][0] == "FULL"
    assert row["spent"] <= 0.75
    assert len(row["metrics"]) == row["epochs"] == 2
    json.dumps(row)


def test_the_table_of_cuts_has_every_way_and_size(study, tmp_path, monkeypatch):
    import cutting

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
