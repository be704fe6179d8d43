"""Models and a file that several tests of ONNX look at."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dynrank_fx.onnx import ExportReport, export_onnx


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Tensor, Path, ExportReport]:
    """A linear layer's file, which tests may read and copy."""
    torch.manual_seed(0)
    model, x, path = nn.Linear(40, 4), torch.randn(2, 40), tmp_path_factory.mktemp("exported") / "linear.onnx"
    return model, x, path, export_onnx(model, x, path, batch_sizes=(1, 3))


@pytest.fixture
def perceptron() -> tuple[nn.Module, tuple[Tensor]]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 8)).eval(), (torch.randn(2, 24),)
