"""Free dimensions under names of the user's: as torch.export takes them, in the file, and at other sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from exporting import graph_of
from torch import Tensor, nn

import dynrank_fx as dr
from dynrank_fx.onnx.dynamic import arguments, name_dimensions_, named_shapes, sizes_of, with_sizes

FLOAT = onnx.TensorProto.FLOAT


class Two(nn.Module):
    def forward(self, x: Tensor, y: Tensor, *, scale: float = 1.0) -> Tensor:
        return x * scale + y


INPUTS: Any = ((torch.arange(6.0).reshape(2, 3),), {"y": torch.ones(2, 3), "scale": 2.0})
DYNAMIC = {"x": {0: "batch", 1: "width"}, "y": {0: "batch", 1: "width"}}


def test_a_dimension_that_the_model_fixes_is_named(perceptron: Any, tmp_path: Path) -> None:
    with pytest.raises(dr.ExportError, match="the model fixes width at the size in the example: leave that dimension"):
        dr.export_onnx(*perceptron, tmp_path / "m.onnx", dynamic={"input": {1: "width"}})


def test_one_name_is_one_dimension_of_torch_export() -> None:
    shapes = named_shapes(Two(), INPUTS, DYNAMIC)
    assert {
        key: None if each is None else {i: dim.__name__ for i, dim in each.items()} for key, each in shapes.items()
    } == {
        "x": {0: "batch", 1: "width"},
        "y": {0: "batch", 1: "width"},
        "scale": None,
    }
    program = torch.export.export(Two(), *INPUTS, dynamic_shapes=shapes)
    x, y = torch.randn(5, 7), torch.randn(5, 7)
    assert torch.equal(program.module()(x, y=y, scale=2.0), x * 2 + y)


@pytest.mark.parametrize(
    ("dynamic", "sentence"),
    [
        ({"z": {0: "batch"}}, r"takes no tensor 'z' to free a dimension of: its inputs are \['x', 'y'\]"),
        ({"scale": {0: "batch"}}, "takes no tensor 'scale'"),
        ({"x": {2: "batch"}}, "x has 2 dimensions, counted from 0, and none is number 2"),
        ({"y": {-1: "batch"}}, "and none is number -1"),
    ],
)
def test_what_is_no_dimension_is_told(dynamic: dict[str, dict[int, str]], sentence: str) -> None:
    with pytest.raises(dr.ExportError, match=sentence):
        named_shapes(Two(), INPUTS, dynamic)


def test_other_sizes_repeat_the_example() -> None:
    """Positional arguments stay so, and what has no such dimension stays as it is."""
    assert sizes_of(Two(), INPUTS, DYNAMIC) == {"batch": 2, "width": 3}
    (x,), kwargs = with_sizes(Two(), INPUTS, DYNAMIC, {"batch": 3})
    assert x.tolist() == [[0, 1, 2], [3, 4, 5], [0, 1, 2]]
    assert list(kwargs) == ["y", "scale"]
    assert kwargs["y"].shape == (3, 3)
    assert kwargs["scale"] == 2.0
    (x,), _ = with_sizes(Two(), INPUTS, DYNAMIC, {"width": 2, "batch": 1})
    assert x.tolist() == [[0, 1]]
    assert list(arguments(Two(), INPUTS)) == ["x", "y", "scale"]


def test_the_file_has_the_names_wherever_the_size_occurs() -> None:
    made = graph_of([], {"x": (FLOAT, ["s0", 4]), "z": (FLOAT, ["s1"])}, {"y": (FLOAT, ["s0", "s1"])}, {})
    name_dimensions_(made, {"x": {0: "batch"}, "z": {0: "length"}})
    dims = [
        [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*made.graph.input, *made.graph.output)
    ]
    assert dims == [["batch", 4], ["length"], ["batch", "length"]]
    with pytest.raises(dr.ExportError, match="the model fixes dimension 1 of x at 4: leave 'width' out"):
        name_dimensions_(made, {"x": {1: "width"}})
