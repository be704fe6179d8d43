"""The scripts among the samples do what they say."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
from several import in_processes

ROOT = Path(__file__).parents[1]


@pytest.fixture
def samples(monkeypatch):
    """The samples folder as scripts find it: their neighbours can be imported."""
    monkeypatch.syspath_prepend(ROOT / "samples")
    yield ROOT / "samples"
    for name in (path.stem for path in (ROOT / "samples").glob("*.py")):
        sys.modules.pop(name, None)


def test_the_demo_does_the_whole_job(samples, tmp_path, capsys):
    demo = runpy.run_path(str(samples / "demo.py"), run_name="demo")
    demo["main"](tmp_path, epochs=3, compiled=False)
    printed = capsys.readouterr().out
    for word in ("sites factored", "agrees with PyTorch", "truncated / dense", "accuracy", "latency, batch 1", "drew"):
        assert word in printed
    assert {p.name for p in tmp_path.iterdir()} == {"dense.onnx", "truncated.onnx", "ranks.png"}


def _with_ddp(rank, samples):
    sys.path.insert(0, samples)
    return runpy.run_path(f"{samples}/with_ddp.py", run_name="with_ddp")["main"](2)


def test_two_processes_learn_the_same(samples):
    first, second = in_processes(_with_ddp, str(samples))
    assert first == second
    assert first[-1] < 1.0


def test_own_loop_learns(samples):
    assert runpy.run_path(str(samples / "own_loop.py"), run_name="own_loop")["main"](2) < 1.0


def test_pipeline_shows_the_factors_as_nodes(samples):
    targets = runpy.run_path(str(samples / "pipeline.py"), run_name="pipeline")["main"]()
    assert {"0.left", "0.right", "3.left", "3.right"} <= set(targets)
