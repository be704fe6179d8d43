"""Where the time of an ONNX file goes, by weight."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import dynrank_fx as dr
from benchmarks.kernels import weight_times
from benchmarks.sites import SiteTime


def test_kernels_are_told_by_their_weights(tmp_path: Path) -> None:
    """Also where onnxruntime fuses what follows into the kernel. The larger weight takes longer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 2048), nn.ReLU())
    model.append(nn.Linear(2048, 4))
    x = torch.randn(16, 3, 8, 8)
    dr.export_onnx(model.eval(), (x,), tmp_path / "model.onnx")
    times = weight_times(tmp_path / "model.onnx", {"input": x.numpy()}, repeats=5)
    assert {name.removesuffix(".weight") for name in times} == {"0", "3", "5"}
    assert times["3.weight"] > times["5.weight"] > 0


def test_why_factors_are_not_faster() -> None:
    net = dr.transform(nn.Sequential(nn.Linear(64, 64)), (torch.randn(100, 64),), rank=dr.Fixed(8))
    (row,) = dr.plan_of(net).sites
    assert SiteTime(row, dense=100.0, factored=50.0).why == ""
    assert SiteTime(row, dense=10.0, factored=12.0).why.startswith("so little work (10 µs)")
    # 2 · 100 · 64 · 64 FLOPs, and 2 · 100 · (64 + 64) · 8.
    said = SiteTime(row, dense=81.92, factored=102.4).why
    assert said == "its thin stages reach 2 GFLOP/s where the dense one reaches 10"
