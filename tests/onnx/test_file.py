"""A file on disk: there as a whole, or not at all and what was there before is."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from exporting import CPU, graph_of
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import dynrank_fx as dr
from dynrank_fx.onnx import Precision, check_place, export_onnx, session
from dynrank_fx.onnx.file import check_file, replacing_file, write_file


def full_disk(*args: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_places_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    linear, x = nn.Linear(4, 4), torch.randn(2, 4)
    with pytest.raises(dr.ExportError, match=r"there is no folder .*nowhere: make it first"):
        export_onnx(linear, x, tmp_path / "nowhere" / "m.onnx")
    with pytest.raises(dr.ExportError, match="is a folder: give the name of a file"):
        export_onnx(linear, x, tmp_path)
    monkeypatch.setattr("dynrank_fx.onnx.file.open", full_disk, raising=False)
    with pytest.raises(dr.ExportError, match="No space left on device"):
        export_onnx(linear, x, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(dr.ExportError, match=r"m\.onnx could not be written .*Permission denied"):
            export_onnx(nn.Linear(4, 4), torch.randn(2, 4), tmp_path / "m.onnx")
    finally:
        tmp_path.chmod(0o700)


def test_weights_in_a_file_of_their_own_can_be_read_by_all_and_written_again(
    perceptron: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        dr.export_onnx(*perceptron, "m.onnx", external_data=True)
    assert Path("m.onnx").stat().st_mode == Path("m.onnx.data").stat().st_mode
    assert Path("m.onnx.data").stat().st_size >= 4 * 24 * 48
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]


def product() -> onnx.ModelProto:
    """y = x @ W with W [64, 32] of ones."""
    kind = onnx.TensorProto.FLOAT
    nodes = [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])]
    return graph_of(nodes, {"x": (kind, ["n", 64])}, {"y": (kind, ["n", 32])}, {"w": np.ones((64, 32), np.float32)})


@pytest.mark.parametrize("outside", [False, True])
def test_what_is_written_runs_from_its_place(tmp_path: Path, outside: bool) -> None:
    path = tmp_path / "m.onnx"
    with replacing_file(path) as beside:
        write_file(product(), beside, outside)
        check_file(beside, Precision.FLOAT32)
        assert not path.exists()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"][: 1 + outside]
    (y,) = session(path, [CPU]).run(None, {"x": np.ones((2, 64), np.float32)})
    assert y.tolist() == [[64.0] * 32] * 2


def test_a_failure_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"precious")

    def stopped() -> None:
        with replacing_file(path) as beside:
            write_file(product(), beside, outside=True)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("m.onnx", b"precious")]


def test_an_invalid_graph_is_told(tmp_path: Path) -> None:
    model = product()
    model.graph.node[0].input[1] = "nothing"
    write_file(model, tmp_path / "m.onnx", outside=False)
    with pytest.raises(dr.ExportError, match=r"the exporter made an invalid ONNX file .*: give another opset"):
        check_file(tmp_path / "m.onnx", Precision.FLOAT32)


def test_a_place_is_checked_before_the_work(tmp_path: Path) -> None:
    check_place(tmp_path / "new.onnx")
    with pytest.raises(dr.ExportError, match="there is no folder"):
        check_place(tmp_path / "no" / "new.onnx")


def test_a_file_written_weight_by_weight_is_the_same_message(tmp_path: Path) -> None:
    weights = [numpy_helper.from_array(np.full((n, 3), n, np.float32), f"w{n}") for n in (1, 20, 300)]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 3])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, 3])
    node = helper.make_node("Identity", ["x"], ["y"])
    graph = helper.make_graph([node], "all", [x], [y], weights, doc_string="of a graph")
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], producer_name="a test")
    expected = onnx.ModelProto.FromString(model.SerializeToString())
    write_file(model, tmp_path / "m.onnx", outside=False)
    assert onnx.load(tmp_path / "m.onnx") == expected
    onnx.checker.check_model(os.fspath(tmp_path / "m.onnx"), full_check=True)
