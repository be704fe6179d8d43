"""The scripts among the samples do what they say."""

from __future__ import annotations

import runpy
import subprocess
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


def _in_both(rank, samples):
    sys.path.insert(0, samples)
    mains = [runpy.run_path(f"{samples}/{name}.py", run_name=name)["main"] for name in ("with_ddp", "sharded")]
    return mains[0](2), mains[1](2)


def test_two_processes_learn_the_same(samples):
    first, second = in_processes(_in_both, str(samples))
    assert first == second
    assert first[0][-1] < 1.0
    assert first[1][-1] < first[1][0] < 4.6  # log(96), of one who knows nothing


def test_own_loop_learns(samples):
    assert runpy.run_path(str(samples / "own_loop.py"), run_name="own_loop")["main"](2) < 1.0


def test_pipeline_shows_the_factors_as_nodes(samples):
    targets = runpy.run_path(str(samples / "pipeline.py"), run_name="pipeline")["main"]()
    assert {"0.left", "0.right", "3.left", "3.right"} <= set(targets)


@pytest.mark.fuzz
def test_tensor_parallelism_sends_once_each_way_for_a_site():
    """Started as a user does, so that each process has an order of its own in its sets."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "samples/tensor_parallel.py"]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "split: up.right, up.left, down.right, down.left" in done.stdout
    assert "outputs and gradients agree; 2 all-reduces forward, 2 backward" in done.stdout
