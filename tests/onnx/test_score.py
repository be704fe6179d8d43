"""Scores of a module and of its files on the same data; and those that say nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dynrank_fx as dr
from dynrank_fx.onnx import Precision, score_onnx

torch.manual_seed(0)
W, X = torch.randn(5, 12), torch.randn(90, 12)
LABELS = (X @ W.T).argmax(1)
DATA = list(zip(X.split(40), LABELS.split(40), strict=True))  # the last batch is a smaller one


class Told(nn.Module):
    """Answers rightly, by a dict with what a metric does not look at."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 5, bias=False)
        self.linear.weight = nn.Parameter(weight.clone())

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"none": None, "logits": self.linear(x)}


def inputs(batch: Any) -> Any:
    return (batch[0],), {}


def accuracy(output: Any, batch: Any) -> Tensor:
    return (output["logits"].argmax(1) == batch[1]).float().mean()


def test_a_file_is_scored_by_what_it_computes_and_batches_by_their_rows(tmp_path: Path) -> None:
    wrong = W.clone()
    wrong[0] = -wrong[0]
    for name, weight in (("right", W), ("wrong", wrong)):
        dr.export_onnx(Told(weight), DATA[0][0], tmp_path / f"{name}.onnx", precision=Precision.INT8_WEIGHTS)
    scores = score_onnx([tmp_path / "right.onnx", tmp_path / "wrong.onnx"], Told(W), DATA, inputs, accuracy)
    assert (scores.pytorch, scores.rows, scores.chance) == (1.0, 90, "")
    by_hand = ((X @ wrong.T).argmax(1) == LABELS).float().mean()
    assert scores.files[0] == pytest.approx(1.0, abs=0.03)
    assert scores.files[1] == pytest.approx(float(by_hand), abs=0.03)


def test_a_model_at_chance_and_one_that_always_says_the_same() -> None:
    said = score_onnx((), Told(torch.randn(5, 12)), DATA, inputs, accuracy).chance
    assert said.startswith("the metric (0.") or said == ""
    shuffled = [(x, labels[torch.randperm(len(labels))]) for x, labels in DATA]
    assert "is at chance, since with the outputs shuffled" in score_onnx((), Told(W), shuffled, inputs, accuracy).chance
    constant = Told(torch.zeros(5, 12))
    assert "gives all 90 examples the same answer" in score_onnx((), constant, DATA, inputs, accuracy).chance


def test_sorted_data_and_single_rows_are_not_taken_for_chance() -> None:
    """There shuffling within a batch makes no difference."""
    order = LABELS.argsort(stable=True)
    by_class = [(X[order][i : i + 1], LABELS[order][i : i + 1]) for i in range(90)]
    assert score_onnx((), Told(W), by_class, inputs, accuracy).chance == ""
    classes = [(X[k == LABELS], LABELS[k == LABELS]) for k in range(5)]
    assert score_onnx((), Told(W), classes, inputs, accuracy).chance == ""


def test_data_that_do_not_fit_are_told(tmp_path: Path) -> None:
    with pytest.raises(dr.ExportError, match="the data gave no batch to score on"):
        score_onnx((), Told(W), [], inputs, accuracy)
    with pytest.raises(dr.ExportError, match="the model does not take a batch of the data"):
        score_onnx((), Told(W), [(X[:, :3], LABELS)], inputs, accuracy)
