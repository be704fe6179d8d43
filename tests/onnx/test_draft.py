"""What a file says of itself, and how its inputs and outputs are called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import dynrank_fx as dr
from dynrank_fx.onnx import export_onnx


def test_names_that_clash(perceptron: Any, tmp_path: Path) -> None:
    """With a weight or another input: refused. With a value inside, which nobody named: that gets another."""
    for names in ({"input_names": ["0.weight"]}, {"input_names": ["a"], "output_names": ["a"]}):
        with pytest.raises(dr.ExportError, match="is the name of another input, output or weight: choose another"):
            dr.export_onnx(*perceptron, tmp_path / "m.onnx", **names)
    with pytest.raises(dr.ExportError, match="give as many output names"):
        dr.export_onnx(*perceptron, tmp_path / "m.onnx", output_names=[""])
    dr.export_onnx(*perceptron, tmp_path / "m.onnx")
    inside = onnx.load(tmp_path / "m.onnx").graph.node[0].output[0]
    dr.export_onnx(*perceptron, tmp_path / "m.onnx", output_names=[inside])
    assert onnx.load(tmp_path / "m.onnx").graph.output[0].name == inside


def test_metadata_opset_and_no_traces_of_this_machine(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    report = export_onnx(nn.Linear(4, 4), torch.ones(2, 4), path, opset=18, metadata={"key": "value"})
    loaded = onnx.load(path)
    assert report.opset == loaded.opset_import[0].version == 18
    assert report.file_size == path.stat().st_size
    said = {"dynrank_fx_version": dr.__version__, "torch_version": torch.__version__, "precision": "float32"}
    said["dynrank_sizes"] = '{"batch": 2}'
    made = {"onnx_version": onnx.__version__, "onnxruntime_version": onnxruntime.__version__}
    told = {p.key: p.value for p in loaded.metadata_props}
    assert told.pop("sha256").startswith("dynrank-fx sha256 of this file ")
    assert told == {**said, **made, "key": "value"}
    assert loaded.producer_name == "dynrank-fx"
    assert str(Path(__file__).parent).encode() not in path.read_bytes()
