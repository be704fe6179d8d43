"""Free dimensions under names of the user's: as torch.export takes them, in the file, and at other sizes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from exporting import graph_of
from torch import Tensor, nn

import dynrank_fx as dr
from dynrank_fx.onnx.dynamic import (
    bounds_in,
    movable_axes,
    name_dimensions_,
    name_free_,
    named_shapes,
    names_of_dims,
    other_sizes,
    sizes_in,
    with_sizes,
    without_names,
)

FLOAT = onnx.TensorProto.FLOAT


class Two(nn.Module):
    def forward(self, x: Tensor, y: Tensor, *, scale: float = 1.0) -> Tensor:
        return x * scale + y


INPUTS: Any = ((torch.arange(6.0).reshape(2, 3),), {"y": torch.ones(2, 3), "scale": 2.0})
DYNAMIC = {"x": {0: "batch", 1: "width"}, "y": {0: "batch", 1: "width"}}
SHAPES = [("batch", "width"), ("batch", "width")]


def test_a_dimension_that_the_model_fixes_is_named(perceptron: Any, tmp_path: Path) -> None:
    with pytest.raises(dr.ExportError, match="the model fixes dimension 1 of input at 24: leave 'width' out"):
        dr.export_onnx(*perceptron, tmp_path / "m.onnx", dynamic={"input": {1: "width"}})


def test_the_dimensions_that_are_named_are_free_for_torch_export() -> None:
    shapes = named_shapes(Two(), INPUTS, DYNAMIC)
    free = dict.fromkeys((0, 1), torch.export.Dim.AUTO)
    assert shapes == {"x": free, "y": free, "scale": None}
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
    assert sizes_in(SHAPES, INPUTS) == {"batch": 2, "width": 3}
    (x,), kwargs = with_sizes(SHAPES, INPUTS, {"batch": 3})
    assert x.tolist() == [[0, 1, 2], [3, 4, 5], [0, 1, 2]]
    assert list(kwargs) == ["y", "scale"]
    assert kwargs["y"].shape == (3, 3)
    assert kwargs["scale"] == 2.0
    (x,), _ = with_sizes(SHAPES, INPUTS, {"width": 2, "batch": 1})
    assert x.tolist() == [[0, 1]]


def test_the_file_has_the_names_wherever_the_size_occurs() -> None:
    made = graph_of([], {"x": (FLOAT, ["s0", 4]), "z": (FLOAT, ["s1"])}, {"y": (FLOAT, ["s0", "s1 + s10"])}, {})
    name_dimensions_(made, {"x": {0: "batch"}, "Z": {0: "length"}}, ["x", "Z"])
    dims = [
        [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*made.graph.input, *made.graph.output)
    ]
    assert dims == [["batch", 4], ["length"], ["batch", "length + s10"]]
    with pytest.raises(dr.ExportError, match="the model fixes dimension 1 of x at 4: leave 'width' out"):
        name_dimensions_(made, {"x": {1: "width"}}, ["x", "Z"])


def names_of(inputs: dict[str, tuple[int, list[Any]]], *sizes: tuple[int, ...]) -> list[list[Any]]:
    made = graph_of([], inputs, {}, {})
    name_free_(made, (tuple(torch.zeros(size) for size in sizes), {}))
    return [[d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim] for value in made.graph.input]


def test_one_size_has_one_name_in_all_inputs_by_what_it_is() -> None:
    ids, mask = (FLOAT, ["s0", "s1"]), (FLOAT, ["s0", "s1"])
    text = ["batch", "sequence"]
    assert names_of({"ids": ids, "mask": mask}, (2, 7), (2, 7)) == [text, text]
    apart = names_of({"ids": ids, "target": (FLOAT, ["s5", "s6", 16])}, (2, 7), (2, 5, 16))
    assert apart == [text, ["batch", "target_sequence", 16]]
    assert names_of({"x": (FLOAT, ["s0", 3, "s1", "s2"])}, (2, 3, 8, 8)) == [["batch", 3, "height", "width"]]
    assert names_of({"x": (FLOAT, ["s0", 3, "s1"])}, (2, 3, 8)) == [["batch", 3, "length"]]
    assert names_of({"x": ids, "t": (FLOAT, ["s3", 4])}, (2, 7), (9, 4)) == [text, ["t_rows", 4]]
    assert names_of({"x": (FLOAT, ["rows", "s1"])}, (2, 7)) == [["rows", "sequence"]]  # a name of the user's


class FourfoldUpTo(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] <= 8
        return x.reshape(len(x), -1, 4)


def test_another_size_is_one_that_the_module_takes() -> None:
    def other(size: int) -> dict[str, int | None]:
        return other_sizes(FourfoldUpTo(), [("batch", "n")], ((torch.zeros(2, size),), {}))

    assert other(4) == {"batch": 3, "n": 8}
    assert other(8) == {"batch": 3, "n": 4}
    assert other_sizes(nn.Linear(3, 2), [("batch", "n")], ((torch.zeros(2, 3),), {})) == {"batch": 3, "n": None}


class Text(nn.Module):
    """Attention over up to 9 tokens with positions of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.ids, self.kinds, self.places = nn.Embedding(20, 8), nn.Embedding(2, 8), nn.Embedding(9, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def forward(self, ids: Tensor, kinds: Tensor, mask: Tensor) -> Tensor:
        x = self.ids(ids) + self.kinds(kinds) + self.places(torch.arange(ids.shape[1], device=ids.device))
        return self.layer(x, src_key_padding_mask=mask == 0)


def test_batch_and_sequence_are_free_under_one_name_and_the_report_says_so(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, ids = Text().eval(), torch.randint(20, (1, 6))
    inputs = {"ids": ids, "kinds": torch.zeros_like(ids), "mask": torch.ones_like(ids)}
    report = dr.export_onnx(model, inputs, tmp_path / "m.onnx")
    assert set(report.shapes.values()) == {("batch", "sequence")}
    assert "batch and sequence free (ids is batch x sequence; kinds is batch x sequence; mask is" in str(report)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    other = {"ids": torch.randint(20, (3, 9)), "kinds": torch.ones(3, 9).long(), "mask": torch.ones(3, 9).long()}
    (got,) = session.run(None, {name: value.numpy() for name, value in other.items()})
    torch.testing.assert_close(torch.from_numpy(got), model(**other), rtol=1e-4, atol=1e-5)
    assert session.get_modelmeta().custom_metadata_map["dynrank_sizes"] == '{"batch": 1, "sequence": 6}'


class Padded(nn.Module):
    """Only the forward of the export is another one at other widths."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_exporting():
            return x * 2
        return x * 2 if x.shape[1] == 6 else x * 3


def test_what_does_not_agree_at_other_sizes_has_a_free_batch_alone(tmp_path: Path) -> None:
    report = dr.export_onnx(Padded(), torch.randn(2, 6), tmp_path / "m.onnx")
    assert report.shapes == {"x": ("batch", 6)}
    assert "batch free (x is batch x 6)" in str(report)


class Upscaled(nn.Module):
    """Height and width have to be multiples of 4."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.up = nn.Conv2d(3, 4, 3, padding=1), nn.ConvTranspose2d(4, 4, 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return torch.cat([x, self.up(nn.functional.max_pool2d(x, 4))], 1)


def test_a_named_size_may_be_restricted_to_multiples(tmp_path: Path) -> None:
    torch.manual_seed(0)
    dynamic = {"x": {0: "n", 2: "h", 3: "w"}}
    report = dr.export_onnx(Upscaled(), torch.randn(2, 3, 8, 8), tmp_path / "m.onnx", dynamic=dynamic)
    assert report.shapes == {"x": ("n", 3, "h", "w")}
    assert "n, h and w free (x is n x 3 x h x w)" in str(report)


Dim = torch.export.Dim
N, H, W = Dim("n"), Dim("h"), Dim("w")


def test_the_names_of_dims_are_found_wherever_tensors_are() -> None:
    class Nested(nn.Module):
        def forward(self, x: Any, *more: Any, **rest: Any) -> Any:
            return x, more, rest

    a = torch.zeros(2, 3)
    inputs: Any = (({"ids": a, "pair": [a, a]}, a), {"last": a, "scale": 1.0})
    shapes = {
        "x": {"ids": {0: N, 1: 2 * H}, "pair": [(N, None), None]},
        "more": ({1: Dim.AUTO},),
        "last": {0: 2, 1: W},
        "scale": None,
    }
    assert names_of_dims(Nested(), inputs, shapes) == {
        "x_ids": {0: "n", 1: "2*h"},
        "x_pair_0": {0: "n"},
        "last": {1: "w"},
    }


class Places(nn.Module):
    """Takes up to 9 places."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.randn(9, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.places[: x.shape[1]]


class CaughtPlaces(Places):
    def forward(self, **batch: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(batch["x"]) * batch["y"]


IMAGE, TEXT = torch.randn(2, 3, 8, 8), torch.randn(2, 9, 4)
COLLECTION = torch.export.ShapesCollection()
COLLECTION[IMAGE] = {0: N, 2: H}


@pytest.mark.parametrize(
    ("module", "inputs", "shapes", "named"),
    [
        (Upscaled, (IMAGE,), {"x": {0: N, 2: H, 3: W}}, {"x": ("n", 3, "h", "w")}),
        (Upscaled, (IMAGE,), ((N, None, H, 8),), {"x": ("n", 3, "h", 8)}),
        (Upscaled, (IMAGE,), COLLECTION, {"x": ("n", 3, "h", 8)}),
        (Upscaled, (IMAGE,), {"x": {0: N, 2: 4 * H, 3: Dim("w", max=64)}}, {"x": ("n", 3, "4*h", "w")}),
        (Places, (TEXT,), {"x": {0: N, 1: W}}, {"x": ("n", "w", 4)}),
        (Places, (TEXT[:1],), {"x": {0: N, 1: W}}, {"x": ("n", "w", 4)}),
        (Places, (TEXT,), {"x": {0: N, 1: Dim("width"), 2: 4}}, {"x": ("n", "width", 4)}),
        (
            CaughtPlaces,
            {"x": TEXT, "y": TEXT},
            {"batch": {"x": {0: N, 1: W}, "y": {0: N, 1: W}}},
            {"x": ("n", "w", 4), "y": ("n", "w", 4)},
        ),
    ],
)
def test_a_dim_may_be_restricted_by_the_model_and_gives_its_name(
    module: Any, inputs: Any, shapes: Any, named: Any, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    report = dr.export_onnx(module(), inputs, tmp_path / "m.onnx", dynamic_shapes=shapes)
    assert report.shapes == named


class Halves(nn.Module):
    """Another model beyond 8 of a width in fours, and none of a single row."""

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[0] > 1
        return x.reshape(x.shape[0], -1, 4) * (2 if x.shape[1] <= 8 else 3)


class Wide(nn.Module):
    """Another model beyond 8."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (2 if x.shape[1] <= 8 else 3)


@pytest.mark.parametrize(
    ("module", "size", "width", "batch", "other", "batches"),
    [
        (Wide(), 8, Dim("w", max=8), N, 7, {1, 2, 5}),  # 9 and 16 are of the other model
        (Wide(), 9, Dim("w", min=9), N, 10, {1, 2, 5}),
        (Halves(), 12, Dim("w", min=9, max=64), Dim("n", min=2), 24, {2, 5}),
        (Halves(), 24, Dim("w", min=9, max=40), Dim("n", min=3, max=4), 12, set()),  # 48 is too much
        (Halves(), 8, 4 * Dim("w", max=2), Dim("n", min=2, max=4), 4, {2}),
    ],
)
def test_the_bounds_of_a_dim_hold_for_what_is_traced_and_compared(
    module: Any, size: int, width: Any, batch: Any, other: int, batches: set[int], tmp_path: Path
) -> None:
    x, names = torch.randn(3, size), (batch.__name__, width.__name__)
    shapes = {"x": {0: batch, 1: width}}
    assert other_sizes(module, [names], ((x,), {}), bounds_in(shapes))[names[1]] == other
    report = dr.export_onnx(module, x, tmp_path / "m.onnx", dynamic_shapes=shapes)
    assert report.shapes == {"x": names}
    assert {each.batch for each in report.agreements} - {3, 4} == batches  # the example has 3, and 4 is another size


def test_bounds_that_leave_one_size_are_told(tmp_path: Path) -> None:
    shapes = {"x": {1: Dim("w", min=12, max=14)}}
    with pytest.raises(dr.ExportError, match="within the bounds of its Dim the model takes a single size"):
        dr.export_onnx(Halves(), torch.randn(3, 12), tmp_path / "m.onnx", dynamic_shapes=shapes)


def test_bounds_are_those_that_were_given() -> None:
    nested = {"x": [{0: Dim("n", min=2), 1: 2 * Dim("h", max=4)}, None], "y": (Dim("free"), Dim.AUTO, 3)}
    found = bounds_in(nested)
    assert (found["n"], found["2*h"].stop) == (range(2, sys.maxsize), 9)
    assert found["free"] == range(sys.maxsize)
    auto = without_names(nested)
    assert auto["x"][0] == {0: Dim.AUTO(min=2), 1: Dim.AUTO(max=8)}
    assert auto["y"] == (Dim.AUTO(), Dim.AUTO, 3)


def test_a_name_of_the_users_is_not_given_to_another_size(tmp_path: Path) -> None:
    shapes = {"input": {2: Dim("width"), 3: Dim.AUTO}}
    report = dr.export_onnx(nn.Conv2d(3, 4, 3), IMAGE, tmp_path / "m.onnx", dynamic_shapes=shapes)
    assert report.shapes == {"input": (2, 3, "width", "other_width")}


@pytest.mark.parametrize(
    ("shapes", "sentence"),
    [
        ({"input": {1: W}}, "^the model fixes dimension 1 of input at 24: leave 'w' out"),
        ({"input": {1: Dim("w", max=25)}}, "^the model fixes dimension 1 of input at 24: leave 'w' out"),
        ({"input": {1: Dim.DYNAMIC}}, "^the model fixes or restricts dimension 1 of input: leave that dimension out"),
    ],
)
def test_a_size_that_the_model_fixes_is_told(perceptron: Any, shapes: Any, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(dr.ExportError, match=sentence):
        dr.export_onnx(*perceptron, tmp_path / "m.onnx", dynamic_shapes=shapes)


@pytest.mark.parametrize(
    ("module", "sizes", "movable"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(64, 2)), [(2, 3, 4, 4)], [set()]),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), [(2, 3, 8, 9)], [{2, 3}]),
        (nn.Sequential(nn.Linear(8, 8), nn.Tanh()), [(2, 8, 8)], [{1}]),
        (Two(), [(2, 3), (2, 3)], [{1}, {1}]),
    ],
)
def test_what_can_move_is_found_by_running_the_module(module: Any, sizes: Any, movable: list[set[int]]) -> None:
    args = tuple(torch.randn(size) for size in sizes)
    assert movable_axes(module, (args, {})) == movable


class Caught(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(50, 16), nn.Linear(16, 4)

    def forward(self, **batch: Tensor) -> Tensor:
        return self.out(self.embed(batch["ids"]) * batch["Mask"][..., None])


class Packed(Caught):
    def forward(self, batch: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
        return super().forward(**batch)


@pytest.mark.parametrize("prefix", ["", "batch_"])
def test_tensors_in_keywords_and_in_a_dict_have_free_dimensions_too(prefix: str, tmp_path: Path) -> None:
    batch = {"Mask": torch.rand(4, 8), "ids": torch.randint(50, (4, 8))}
    model, inputs = (Packed(), (batch,)) if prefix else (Caught(), batch)
    assert "batch and sequence free" in str(dr.export_onnx(model, inputs, tmp_path / "auto.onnx"))
    dynamic = {f"{prefix}{name}": {0: "rows", 1: "length"} for name in batch}
    report = dr.export_onnx(model, inputs, tmp_path / "m.onnx", dynamic=dynamic)
    assert set(report.shapes.values()) == {("rows", "length")}
    net = dr.transform(model, inputs, rank=dr.Fixed(2), how=dr.Capture.EXPORT)
    assert "batch and sequence free" in str(dr.export_onnx(dr.truncate(net), inputs, tmp_path / "small.onnx"))


class OfFour(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(4, 2, 3).cumsum(1)


def test_real_inputs_are_compared_at_the_batch_that_a_file_fixes(tmp_path: Path) -> None:
    for rows in (3, 20):
        real = [(torch.randn(rows, 3),)]
        report = dr.export_onnx(OfFour(), (torch.randn(8, 3),), tmp_path / "m.onnx", more_inputs=real)
        assert [agreement.batch for agreement in report.agreements] == [8, 8]
