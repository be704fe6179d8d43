"""Fine-tuning: what the ways spend and hold is what is said of them, and each has the rate that was best for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from benchmarks import finetune
from benchmarks.finetune import (
    DISTILLED,
    FULL,
    LANDING,
    NARROW,
    RATES,
    WAYS,
    Run,
    chosen,
    forward_flops,
    held,
    kept,
    rates,
    step,
)


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(finetune.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(finetune, "WIDTH", 32)
    monkeypatch.setattr(finetune, "WINDOWS", 4)
    finetune.narrower_width.cache_clear()


def test_every_row_that_is_kept_is_of_the_grid_and_took_the_flops_it_says() -> None:
    for run, row in kept().items():
        assert (run.way, run.rank) in WAYS
        assert run.lr in rates(run.way)
        if run.equal == "FLOPs" and run.way != finetune.SCRATCH:
            assert row["training_flops"] == pytest.approx(1, abs=0.01)
        if run.equal == "steps":
            assert row["steps"] == finetune.STEPS
            assert run.lr == chosen(kept(), run.way, run.rank)


def test_the_rate_is_the_best_of_seed_0_once_all_were_tried() -> None:
    done = {Run(FULL, 0.0, "FLOPs", lr, 0): {"loss": abs(lr - 0.0021)} for lr in RATES}
    assert chosen(done, FULL, 0.0) == 0.002
    del done[Run(FULL, 0.0, "FLOPs", RATES[0], 0)]
    assert chosen(done, FULL, 0.0) is None


@pytest.mark.usefixtures("temporary")
@pytest.mark.parametrize("way", [LANDING, DISTILLED, NARROW])
def test_equal_flops_are_equal_and_what_is_left_is_small(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetune.Text, "held_out_loss", lambda *_: 0.0)
    row = finetune.train(Run(way, 0.25, "FLOPs", 1e-3, 0), steps=20, before=1)
    assert row["training_flops"] == pytest.approx(1, abs=0.06)
    assert row["step_flops"] < 0.6
    dense = finetune.pretrained(32, 0, 1)
    assert row["inference_flops"] == pytest.approx(0.43 * forward_flops(dense), rel=0.2)
    assert row["parameters"] < 0.7 * sum(p.numel() for p in dense.parameters())


def test_a_teacher_that_is_the_model_itself_changes_nothing() -> None:
    torch.manual_seed(0)
    model = nn.Embedding(5, 5)
    batch = torch.tensor([[0, 1, 2]]), torch.tensor([[1, 2, 3]])
    gradients = []
    for teacher in (None, model):
        step(model, AdamW(model.parameters(), lr=0.0), batch, teacher)
        gradients.append(model.weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


def test_adamw_holds_three_numbers_for_each_that_trains() -> None:
    model = nn.Linear(4, 4, bias=False)
    optimizer = AdamW(model.parameters())
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    steps = 4
    assert held(model, optimizer) == (3 * 16 * 4 + steps, 16 * 4)
