"""Calibration batches: what is no batch is told before it is used."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import pytest
import torch
from compressing import batches, perceptron
from torch import Tensor, nn

import dynrank_fx as dr
from dynrank_fx.compression import compress
from dynrank_fx.compression.batches import call, checked_batches
from dynrank_fx.errors import CalibrationError
from dynrank_fx.plan import Fixed


@pytest.mark.parametrize(
    ("batches", "words"),
    [
        ([], "empty"),
        ([(torch.zeros(0, 12),)], "empty"),
        (7, "int are no batches"),
        ([(torch.full((2, 12), float("nan")),)], "batch 0 holds numbers that are not finite"),
        ([(torch.randn(2, 12),), (torch.randn(2, 11),)], "batch 1 does not fit the model"),
        ([(torch.full((2, 12), 3e38),)], "inputs of weight are not finite, or too large"),
    ],
)
def test_bad_calibration_data_are_a_sentence(batches: Any, words: str) -> None:
    model = nn.Linear(12, 12)
    nn.init.ones_(model.weight)
    net = dr.transform(model, (torch.randn(2, 12),), rank=Fixed(2))
    with pytest.raises(CalibrationError, match=words):
        dr.truncate(net, batches)


def test_batches_of_other_dimensions_than_the_example_inputs_are_refused() -> None:
    """A linear layer takes them without a word."""
    with pytest.raises(dr.CalibrationError, match=r"batch 1 have 3 dimensions and those of the example inputs 2"):
        compress(perceptron(), batches()[0], dr.Budget(params=0.5), [*batches()[:1], (torch.randn(2, 3, 32),)])


class Scaled(nn.Module):
    """Writes to its input, as some models do."""

    def forward(self, x: Tensor, *, by: float = 1.0) -> Tensor:
        return x.mul_(by)


def test_a_batch_is_taken_as_example_inputs_are_and_is_not_written_to() -> None:
    x = torch.ones(2, 3)
    for batch in (x, (x,), ((x,), {"by": 2.0}), {"x": x, "by": 2.0}, UserDict(x=x, by=2.0)):
        wanted = 1.0 if batch is x or len(batch) == 1 else 2.0
        assert torch.equal(call(Scaled(), batch, 0), torch.full((2, 3), wanted))
        assert torch.equal(x, torch.ones(2, 3))


def test_an_iterator_is_drawn_once_into_a_list() -> None:
    found = checked_batches((torch.full((1, 2), float(i)),) for i in range(3))
    assert [float(x[0, 0]) for (x,), _ in found] == [0.0, 1.0, 2.0]


def test_what_the_model_says_is_told_with_the_number_of_the_batch() -> None:
    with pytest.raises(CalibrationError, match=r"batch 7 does not fit the model \(RuntimeError: mat1 and mat2"):
        call(nn.Linear(3, 4), torch.ones(2, 5), 7)


def test_one_tensor_is_no_list_of_batches() -> None:
    with pytest.raises(CalibrationError, match="calibration data of one tensor are no batches: give a list of them"):
        checked_batches(torch.randn(4, 3))


def test_a_mapping_is_a_batch_and_no_list_of_them() -> None:
    batch = UserDict(x=torch.randn(4, 3))
    assert torch.equal(checked_batches([batch])[0][1]["x"], batch["x"])
    with pytest.raises(CalibrationError, match="of one mapping are no batches: give a list of them"):
        checked_batches(batch)
    with pytest.raises(CalibrationError, match="batch 0 holds numbers that are not finite"):
        checked_batches([UserDict(x=torch.full((1,), torch.nan))])
