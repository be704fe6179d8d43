"""Contract 4, its other half: the ONNX file of a truncated net, run by onnxruntime, equals the net on other shapes.

An export takes a second or so: every day on few cells, that have every family of layers, every layout and every
capture; `make fuzz` runs the others.
"""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
import torch
from grid import FAMILIES, LOW, Cell, cells

import dynrank_fx as dr

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")


@cells(every_day=FAMILIES)
def test_the_file_computes_what_the_truncated_net_does_on_another_batch(cell: Cell, tmp_path: Path) -> None:
    net, x = cell.net(dtype=torch.float32).eval(), cell.inputs(torch.float32)
    dr.enter_(net, LOW)
    small, path = dr.truncate(net), tmp_path / "model.onnx"
    report = dr.export_onnx(small, (x,), path)
    assert report.dynamic_batch
    opened = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    more = torch.cat([x, x.flip(0), x])
    (got,) = opened.run(None, {opened.get_inputs()[0].name: more.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), small(more).detach(), rtol=1e-4, atol=1e-5)
    held = sum(p.numel() for p in small.parameters())
    assert report.params < held + 60, "no product of factors is in the file, only small constants besides them"
