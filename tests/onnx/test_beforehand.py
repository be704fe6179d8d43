"""What would stop an export is said before the work."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from exporting import CPU
from torch import Tensor, nn

import dynrank_fx as dr
from dynrank_fx.onnx import Precision, check_names, check_precision, check_room


class Two(nn.Module):
    def forward(self, x: Tensor, *, y: Tensor) -> tuple[Tensor, Tensor]:
        return x + y, x * y


INPUTS: Any = ((torch.ones(2, 3),), {"y": torch.ones(2, 3)})


@pytest.mark.parametrize("provider", [CPU, None, (CPU, {})])
def test_a_type_that_the_provider_cannot_multiply(provider: Any) -> None:
    with pytest.raises(dr.ExportError, match="CPUExecutionProvider has no product of matrices in bfloat16: export in"):
        check_precision(Precision.BFLOAT16, provider)
    for precision in (Precision.FLOAT32, Precision.FLOAT16, Precision.INT8_WEIGHTS):
        check_precision(precision, provider)


def test_names_are_as_many_as_there_are_tensors() -> None:
    check_names(Two(), INPUTS, ["a", "b"], ["c", "d"], {"y": {0: "rows"}})
    for names in (["a"], ["a", "a"], ["a", ""]):
        with pytest.raises(dr.ExportError, match="the model has 2 inputs and these are names of"):
            check_names(Two(), INPUTS, names)
        with pytest.raises(dr.ExportError, match="the model has 2 outputs and these are names of"):
            check_names(Two(), INPUTS, (), names)
    with pytest.raises(dr.ExportError, match="takes no tensor 'z'"):
        check_names(Two(), INPUTS, dynamic={"z": {0: "rows"}})
    with pytest.raises(dr.ExportError, match="the model fails on its example inputs"):
        check_names(Two(), (torch.ones(2),), output_names=["a"])


def test_a_disk_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 300_000})())
    model = nn.Linear(300, 500, bias=False)  # 600 kB
    with pytest.raises(dr.ExportError, match=r"m.onnx may take 0\.60 MB and its disk has 0\.30 MB left: make room"):
        check_room(tmp_path / "m.onnx", model)
    check_room(tmp_path / "m.onnx", model, Precision.INT8_WEIGHTS)
