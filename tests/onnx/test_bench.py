"""Timings of files: of what really ran, in turn with another, at the batch sizes that the file takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from exporting import CPU
from torch import nn

import dynrank_fx as dr
from dynrank_fx.onnx import bench, bench_onnx, onnx_machine, table
from dynrank_fx.onnx.bench import Timing
from dynrank_fx.timing import Pair


@pytest.fixture(autouse=True)
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory has tests of its own."""
    monkeypatch.setattr(bench, "memory_of", lambda *_: (None, None))


def test_a_file_of_one_batch_is_run_at_that(tmp_path: Path) -> None:
    class One(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.reshape(4, 3) * 2

    path = tmp_path / "fixed.onnx"
    dr.export_onnx(One(), torch.randn(4, 3), path)
    assert isinstance(onnx.load(path).graph.input[0].type.tensor_type.shape.dim[0].dim_value, int)
    assert [timing.batch for timing in bench_onnx(path, repeats=5, warmup=1)] == [4]


def test_percentiles_and_throughput_are_those_of_the_times(exported: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    times = [0.01 * (i + 1) for i in range(100)]
    monkeypatch.setattr(bench, "_times", lambda call, repeats: list(reversed(times)))
    (found,) = bench_onnx(exported[2], batch_sizes=(4,), providers=[CPU], repeats=5, warmup=1)
    assert found == Timing(
        str(exported[2]),
        CPU,
        4,
        pytest.approx(0.505),
        pytest.approx(0.91),
        pytest.approx(1.0),
        pytest.approx(4 / 0.505),
        None,
        None,
        None,
    )


def test_the_ratio_is_of_the_first_file_over_the_other(exported: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """``interleaved`` gives second / first, so that the other file goes first."""
    seen: list[tuple[Any, Any]] = []

    def interleaved(first: Any, second: Any, **settings: Any) -> Pair:
        seen.append((first, second))
        return Pair(2.0, 1.0, 0.5)

    calls: list[Any] = []
    bound = bench.bound
    monkeypatch.setattr(bench, "interleaved", interleaved)
    monkeypatch.setattr(bench, "bound", lambda *given: calls.append(bound(*given)) or calls[-1])
    found = bench_onnx(exported[2], exported[2], batch_sizes=(1,), repeats=5, warmup=1)
    assert [timing.ratio for timing in found] == [0.5, None]
    assert seen == [(calls[1], calls[0])]


def test_a_cuda_graph_is_of_one_batch_size(exported: Any) -> None:
    graphs = ("CUDAExecutionProvider", {"enable_cuda_graph": "1"})
    with pytest.raises(dr.ExportError, match="a CUDA graph is of one batch size: give one alone"):
        bench_onnx(exported[2], providers=[graphs], batch_sizes=(1, 2))


def test_the_table_and_its_json() -> None:
    timing = Timing("m.onnx", CPU, 8, 0.0012345, 0.002, 0.003, 6480.4, 12_400_000, None, 0.456)
    head, _, row = table([timing]).splitlines()
    assert head.split() == [
        "file",
        "provider",
        "batch",
        "median",
        "ms",
        "p90",
        "p99",
        "per",
        "second",
        "memory",
        "MB",
        "ratio",
    ]
    assert row.split() == ["m.onnx", "CPU", "8", "1.234", "2.000", "3.000", "6,480", "12", "0.46"]
    assert "unknown" in table([Timing("m.onnx", CPU, 8, 1.0, 1.0, 1.0, 1.0, None, None)])
    assert json.loads(json.dumps(timing.to_json()))["batch"] == 8


def test_the_machine_is_told_with_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    for said, words in (("1", ", 1 thread; "), ("4", ", 4 threads; "), ("", ", its own number of threads; ")):
        monkeypatch.setenv("OMP_NUM_THREADS", said)
        assert words in onnx_machine()


def test_a_file_of_other_inputs_is_no_other_to_be_faster_than(tmp_path: Path) -> None:
    dr.export_onnx(nn.Linear(4, 4), torch.randn(2, 4), tmp_path / "flat.onnx")
    dr.export_onnx(nn.Conv2d(3, 4, 1), torch.randn(2, 3, 5, 5), tmp_path / "picture.onnx")
    with pytest.raises(dr.ExportError, match="they are of two models"):
        bench_onnx(tmp_path / "flat.onnx", tmp_path / "picture.onnx", batch_sizes=(1,), repeats=5, warmup=1)
