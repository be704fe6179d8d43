"""Statistics of batch norms that are not finite are found by name, and refused before they hide in a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import dynrank_fx as dr
from dynrank_fx.compression import recalibrate_
from dynrank_fx.tracing import infinite_statistic

X = torch.randn(8, 12, generator=torch.Generator().manual_seed(0))


def broken(value: float) -> nn.Module:
    """A model of finite outputs, with a mask that is as it should be."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Linear(16, 8))
    model.register_buffer("mask", torch.full((4, 4), float("-inf")).triu(1))
    model.get_buffer("1.running_var")[3] = value
    return model.eval()


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("how", [None, dr.Capture.EXPORT, dr.Capture.MODULES])
def test_the_first_is_named_however_the_model_was_captured(how: dr.Capture | None, value: float) -> None:
    found = infinite_statistic(dr.capture(broken(value), (X,), how=how))
    assert found is not None
    assert found.endswith("running_var")
    assert infinite_statistic(broken(1.0)) is None


def test_an_export_and_a_compression_refuse_it_and_new_statistics_mend_it(tmp_path: Path) -> None:
    model = broken(float("inf"))
    assert torch.isfinite(model(X)).all()
    sentence = r"^1\.running_var is not finite, as after a training that has diverged: load sound weights, or give"
    with pytest.raises(dr.ExportError, match=sentence):
        dr.export_onnx(model, (X,), tmp_path / "m.onnx")
    with pytest.raises(dr.CalibrationError, match=sentence):
        dr.compress(model, (X,), dr.Budget(params=0.9), [(X,)], times=None)
    assert list(tmp_path.iterdir()) == []
    recalibrate_(model, [(X,)])
    assert infinite_statistic(model) is None
    dr.export_onnx(model, (X,), tmp_path / "m.onnx")
