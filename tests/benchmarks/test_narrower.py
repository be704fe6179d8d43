"""Against a narrower dense model: both sides take the same FLOPs, and the scenes of digits are what they say."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch

from benchmarks.study import narrower, scenes
from benchmarks.study.narrower import DENSE, EARLY, LOW, TASKS, Cell, Run


def test_every_row_that_is_kept_is_of_the_grid() -> None:
    assert set(narrower.kept()) <= set(narrower.cells())


def test_the_narrower_model_takes_as_many_flops_as_low() -> None:
    run = Run.of(Cell("characters", 64, 0.25, DENSE, "AdamW", 0, 1), TASKS["characters"])
    narrow = run.task.flops(run.task.model(run.narrower_width, 4))
    assert narrow == pytest.approx(run.low, rel=0.07)
    assert run.low < 0.5 * run.full


@pytest.mark.parametrize("way", [DENSE, LOW, EARLY])
def test_every_way_takes_the_same_training_and_ends_small(way: str) -> None:
    row = narrower.train(Cell("characters", 32, 0.25, way, "Muon", 0, 12))
    assert row["training_flops"] == pytest.approx(row["step_flops"] if way == LOW else 0.44, rel=0.1)
    assert row["step_flops"] < 0.5
    assert 3 < row["loss"] < 6


def test_the_line_of_a_way_says_how_far_it_is_from_the_narrower_model_at_its_best_rate() -> None:
    def row(way: str, seed: int, loss: float, rate: float = 1.0) -> dict[str, object]:
        cell = Cell("t", 64, 0.25, way, "AdamW", seed, 10, rate)
        return {**asdict(cell), "trained_width": 40, "steps": 9, "step_flops": 0.4, "loss": loss}

    dense = [row(DENSE, 0, 1.5), row(DENSE, 1, 1.5), row(DENSE, 0, 1.25, rate=0.5)]
    lines = narrower.table([row(LOW, 0, 2.0), row(LOW, 1, 1.75), *dense]).rows
    assert [(line[5], line[6]) for line in lines] == [(DENSE, 0.5), (DENSE, 1), (LOW, 1)]
    assert [line[-1] for line in lines] == pytest.approx([0, 0.125, (0.75 + 0.25) / 2])


def test_a_scene_has_two_to_four_digits_and_the_held_out_ones_are_always_the_same() -> None:
    images, labels = next(iter(scenes.train_data(64, 1)))
    assert images.shape == (64, 1, 32, 32)
    assert labels.shape == (64, 10)
    counts = labels.sum(1)
    assert counts.min() >= 1  # two digits may be alike
    assert counts.max() <= 4
    again = list(scenes.Scenes(scenes._split()[1], 256, 1, seed=0))
    assert torch.equal(again[0][0], scenes.eval_data()[0][0])


def test_what_is_read_counts_only_where_all_of_it_is_right() -> None:
    labels = torch.tensor([[1.0, 0, 1], [1, 0, 1]])
    output = torch.tensor([[3.0, -2, 4], [3, 2, 4]])
    assert scenes.metric(output, (torch.empty(0), labels)) == 0.5
