"""Random inputs of a file: of its types and shapes, and within the tables that integers are looked up in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from exporting import CPU, graph_of

import dynrank_fx as dr
from dynrank_fx.onnx import loaded, random_inputs, session_of, table_rows

FLOAT, INT64, BOOL, INT8 = (getattr(onnx.TensorProto, name) for name in ("FLOAT", "INT64", "BOOL", "INT8"))


def node(kind: str, inputs: str, output: str, **attributes: Any) -> onnx.NodeProto:
    return onnx.helper.make_node(kind, inputs.split(), [output], **attributes)


def looked_up(*nodes: onnx.NodeProto) -> onnx.ModelProto:
    """A table "t" of 7 rows and another "s" of 5, and integers "i"."""
    tables = {"t": np.ones((7, 3), np.float32), "s": np.ones((5, 3), np.float32), "v": np.ones(9, np.float32)}
    return graph_of(list(nodes), {"i": (INT64, ["n"])}, {"y": (FLOAT, None)}, tables)


@pytest.mark.parametrize(
    ("nodes", "rows"),
    [
        ([node("Gather", "t i", "y")], {"i": 7}),
        ([node("Gather", "t i", "a"), node("Gather", "s i", "b"), node("Add", "a b", "y")], {"i": 5}),
        ([node("Cast", "i", "j", to=INT64), node("Gather", "t j", "y")], {"i": 7}),
        ([node("Gather", "t i", "y", axis=1)], {}),
        ([node("Gather", "v i", "y")], {}),  # no table: a vector
        ([node("Add", "i i", "j"), node("Gather", "t j", "y")], {}),  # not the input itself
    ],
)
def test_the_least_table_that_an_input_is_looked_up_in(nodes: list[onnx.NodeProto], rows: dict[str, int]) -> None:
    assert table_rows(looked_up(*nodes)) == rows


def test_types_and_shapes_are_those_of_the_session() -> None:
    inputs = {"x": (FLOAT, ["n", 4]), "i": (INT64, ["n", "length"]), "b": (BOOL, [2]), "q": (INT8, ["n"])}
    nodes = [node("Identity", name, f"{name}_out") for name in inputs]
    model = graph_of(nodes, inputs, {f"{name}_out": each for name, each in inputs.items()}, {})
    opened = session_of(model.SerializeToString(), CPU)
    feeds = random_inputs(opened, 6, rows={"i": 50})
    assert {name: (str(array.dtype), array.shape) for name, array in feeds.items()} == {
        "x": ("float32", (6, 4)),
        "i": ("int64", (6, 16)),
        "b": ("bool", (2,)),
        "q": ("int8", (6,)),
    }
    assert 1 < feeds["i"].max() < 50
    assert set(feeds["q"]) <= {0, 1}
    opened.run(None, feeds)
    again, other = random_inputs(opened, 6, rows={"i": 50}), random_inputs(opened, 6, seed=1, rows={"i": 50})
    assert np.array_equal(feeds["x"], again["x"])
    assert not np.array_equal(feeds["x"], other["x"])


def test_a_type_of_which_there_are_no_random_values_is_told() -> None:
    kind = (onnx.TensorProto.STRING, ["n"])
    model = graph_of([node("Identity", "s", "y")], {"s": kind}, {"y": kind}, {})
    with pytest.raises(dr.ExportError, match=r"the input s is tensor\(string\), of which no random values can be made"):
        random_inputs(session_of(model.SerializeToString(), CPU), 2)


def test_what_is_no_onnx_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"\xff" * 100)
    with pytest.raises(dr.ExportError, match=r"m\.onnx is no ONNX file, or is damaged"):
        loaded(tmp_path / "m.onnx")


@pytest.mark.parametrize("noted", ["{", "[4]", '{"n": 0}', '{"n": "4"}', '{"n": 1.5}'])
def test_what_a_damaged_file_notes_of_its_inputs_is_a_sentence(noted: str) -> None:
    model = looked_up(node("Gather", "t i", "y"))
    model.metadata_props.add(key="dynrank_sizes", value=noted)
    with pytest.raises(dr.ExportError, match=r"cannot be read .* it is damaged; export it again"):
        random_inputs(session_of(model.SerializeToString(), CPU), 2)
