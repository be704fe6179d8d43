"""The memory of one file, seen by a process that nothing else is loaded in."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from exporting import CPU
from torch import nn

import dynrank_fx as dr
from dynrank_fx.onnx import memory
from dynrank_fx.onnx.memory import memory_of

PROVIDER = (CPU, {})
X = {"input": np.zeros((1, 500), np.float32)}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """40 MB of weights, and 1 MB."""
    folder, x = tmp_path_factory.mktemp("files"), torch.randn(2, 500)
    dr.export_onnx(nn.Linear(500, 20000), (x,), folder / "large.onnx", batch_sizes=(1,))
    dr.export_onnx(nn.Linear(500, 500), (x,), folder / "small.onnx", batch_sizes=(1,))
    return folder / "large.onnx", folder / "small.onnx"


@pytest.mark.parametrize("first", [0, 1])
def test_it_is_that_of_the_file_whichever_comes_first(files: tuple[Path, Path], first: int) -> None:
    taken = {path.stem: memory_of(path, PROVIDER, X) for path in (files[first], files[1 - first])}
    (large, _), (small, on_gpu) = taken["large"], taken["small"]
    assert large is not None
    assert small is not None
    assert 38e6 < large < 200e6
    assert small < 0.4 * large
    assert on_gpu is None


def test_files_beside_the_script_are_no_modules_of_its_process(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor are those of the folder in which the user works."""
    script, here = tmp_path / "package" / "memory.py", tmp_path / "here"
    script.parent.mkdir()
    here.mkdir()
    shutil.copy(memory.__file__, script)
    for folder in (script.parent, here):
        for name in ("numpy", "onnxruntime", "json"):
            (folder / f"{name}.py").write_text("raise SystemExit(7)")
    monkeypatch.setattr(memory, "__file__", str(script))
    monkeypatch.chdir(here)
    assert memory_of(files[1], PROVIDER, X)[0] is not None


@pytest.mark.parametrize("broken", ["no interpreter", "no provider", "no file"])
def test_where_it_cannot_be_told_it_is_unknown(
    files: tuple[Path, Path], broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if broken == "no interpreter":
        monkeypatch.setattr(memory.sys, "executable", shutil.which("false"))
    provider = ("ToasterExecutionProvider", {}) if broken == "no provider" else PROVIDER
    path = files[1].with_name("no.onnx") if broken == "no file" else files[1]
    assert memory_of(path, provider, X) == (None, None)


def test_bytes_of_this_process() -> None:
    """What was taken shows in the peak, and stays there when it is given back."""
    before = memory._resident("VmHWM")
    taken = np.ones(30_000_000 + before // 8)
    assert memory._resident("VmRSS") >= taken.nbytes
    size = taken.nbytes
    del taken
    assert memory._resident("VmHWM") >= size
