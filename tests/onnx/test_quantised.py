"""onnxruntime's own quantisers on the files that are written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnxruntime.quantization import CalibrationDataReader, quantize_dynamic, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import nn

import dynrank_fx as dr

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Rows(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
    """Two batches for a quantiser."""

    def __init__(self) -> None:
        self.rows: Iterator[dict[str, np.ndarray]] = iter([{"input": X.numpy()}] * 2)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.rows, None)


@pytest.fixture(scope="module", params=["dense", "low", "truncated", "layers"])
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A file with convolutions and linear layers, and what its module gives."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Flatten()]
    model: nn.Module = nn.Sequential(*layers, nn.Linear(1024, 64), nn.ReLU(), nn.Linear(64, 48)).eval()
    if request.param != "dense":
        form = dr.Form.LAYERS if request.param == "layers" else dr.Form.GRAPH
        model = dr.transform(model, (X,), rank=dr.Ratio(0.25), form=form).eval()
        dr.enter_(model, dr.Phase.LOW)
    if request.param in ("truncated", "layers"):
        model = dr.truncate(model)
    path = tmp_path_factory.mktemp(request.param) / "m.onnx"
    dr.export_onnx(model, (X,), path)
    with torch.no_grad():
        return path, model(X)


def test_what_is_stored_is_not_described_a_second_time(file: tuple[Path, torch.Tensor]) -> None:
    graph = onnx.load(file[0]).graph
    assert not {value.name for value in graph.value_info} & {each.name for each in graph.initializer}
    assert graph.value_info


@pytest.mark.parametrize(
    "quantised",
    [
        lambda source, path: quantize_dynamic(source, path),
        lambda source, path: quantize_static(source, path, Rows()),
        lambda source, path: quant_pre_process(source, path),
    ],
    ids=["dynamic", "static", "prepared"],
)
def test_a_quantiser_takes_the_file_and_stays_near_it(
    file: tuple[Path, torch.Tensor], quantised: Callable[[Path, Path], None], tmp_path: Path
) -> None:
    source, expected = file
    quantised(source, tmp_path / "q.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "q.onnx", providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {"input": X.numpy()})
    distance = np.linalg.norm(output - expected.numpy()) / np.linalg.norm(expected.numpy())
    assert distance < 0.1
