"""The time of a file beside the same model with dense weights: both run, in turn, on the same inputs."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from exporting import CPU
from torch import nn

import dynrank_fx as dr
import dynrank_fx.onnx.beside
from dynrank_fx.onnx import Beside, Precision, time_beside

N = 768


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dynrank_fx.onnx.beside, "_SECONDS", 0.1)


def test_factors_of_low_rank_take_less_time_than_the_dense_weight_and_it_takes_more(tmp_path: Path) -> None:
    """Of a hundredth of the FLOPs, so that no load of the machine turns it round."""
    torch.manual_seed(0)
    inputs, path = (torch.randn(64, N),), tmp_path / "m.onnx"
    factored, dense = nn.Sequential(nn.Linear(N, 4, bias=False), nn.Linear(4, N)), nn.Linear(N, N)
    for module, other in ((factored, dense), (dense, factored)):
        dr.export_onnx(module, inputs, path, batch_sizes=(2,))
        found = time_beside(path, other, inputs)
        assert (found.batch, found.provider) == (64, CPU)
        assert found.slower == (module is dense)
        assert (found.ratio > 1) == (found.seconds > found.other_seconds) == (module is dense)


def test_the_dense_side_is_of_the_same_type_and_opset_whatever_the_inputs_are_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = []
    real = dynrank_fx.onnx.beside.session_of
    monkeypatch.setattr(dynrank_fx.onnx.beside, "session_of", lambda model, p: models.append(model) or real(model, p))
    inputs, path = (torch.randn(3, 64),), tmp_path / "m.onnx"
    factored = nn.Sequential(nn.Linear(64, 32, bias=False), nn.Linear(32, 64))
    int8 = Precision.INT8_WEIGHTS
    dr.export_onnx(factored, inputs, path, precision=int8, opset=21, input_names=["x"], batch_sizes=(2,))
    assert time_beside(path, nn.Linear(64, 64), inputs, precision=int8, opset=21).ratio > 0
    (model,) = map(onnx.load_from_string, models)
    assert model.opset_import[0].version == 21
    assert [each.dims for each in model.graph.initializer if each.data_type == onnx.TensorProto.INT8] == [[64, 64]]


def test_it_is_one_line_and_a_dict() -> None:
    found = Beside(Path("m.onnx"), CPU, 8, 0.62e-3, 1e-3, 0.62, (0.6, 0.7))
    assert str(found) == f"m.onnx takes 0.62 of the time of the same model with dense weights (batch 8, {CPU})"
    assert found.to_json()["file"] == "m.onnx"
    assert not found.slower
    assert not Beside(Path("m.onnx"), CPU, None, 1.02e-3, 1e-3, 1.02, (0.97, 1.1)).slower, "it may be chance"


def test_what_cannot_be_run_dense_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dr.export_onnx(nn.Linear(4, 4), (torch.randn(2, 4),), tmp_path / "m.onnx")
    two = torch.randn(2, 4), torch.randn(2, 4)
    with pytest.raises(dr.ExportError, match="it takes 2 inputs with dense weights, and the file 1"):
        time_beside(tmp_path / "m.onnx", nn.Bilinear(4, 4, 4), two)
    monkeypatch.setattr(dynrank_fx.onnx.beside, "MAX_BYTES", 8)
    with pytest.raises(dr.ExportError, match=r"with dense weights it has 0\.0 GB, and is not run from memory"):
        time_beside(tmp_path / "m.onnx", nn.Linear(4, 4), (torch.randn(2, 4),))
