"""The documents execute: the README's example and commands, and the scripts among the samples."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import dynrank_fx as dr
from dynrank_fx.cli.main import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def samples(monkeypatch):
    """The samples folder as scripts find it: their neighbours can be imported."""
    monkeypatch.syspath_prepend(ROOT / "samples")
    yield ROOT / "samples"
    for name in (path.stem for path in (ROOT / "samples").glob("*.py")):
        sys.modules.pop(name, None)


def test_the_readmes_example_runs_and_writes_its_file(tmp_path, monkeypatch, capsys):
    (example,) = re.findall(r"<!-- example.*?-->\n```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (phases,) = re.findall(r"<!-- phases.*?-->\n```python\n(.*?)```", README, re.DOTALL)
    names = {"__name__": "readme"}
    exec(compile(example, "README.md", "exec"), names)
    assert (tmp_path / "small.onnx").exists()
    printed = capsys.readouterr().out
    assert "2 sites factored" in printed
    assert "agrees with PyTorch" in printed
    exec(compile(phases, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert printed.startswith("FULL FULL for 2 of 2 sites")
    assert printed.endswith("LOW LOW: every site is cut\n")


def test_the_readmes_commands_run(tmp_path, monkeypatch):
    first, second = re.findall(r"```sh\n(dynrank-fx .*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "samples").symlink_to(ROOT / "samples")
    extra = {
        "train": ["--epochs", "2", "--schedule", "interleave", "--no-compile"],
        "export": [],
        "inspect": ["--model", "samples/digits.py"],
        "bench": ["--repeats", "5"],
    }
    for line in (first + second).splitlines():
        command = shlex.split(line, comments=True)
        assert command[0] == "dynrank-fx"
        result = CliRunner().invoke(cli, [*command[1:], *extra.get(command[1], [])])
        assert result.exit_code == 0, result.output
    assert (tmp_path / "digits.onnx").exists()
    assert all((tmp_path / name).exists() for name in ("small.onnx", "smaller.onnx", "faster.onnx", "small.pt"))
    assert (tmp_path / "ranks.png").read_bytes().startswith(b"\x89PNG")


def test_every_command_and_public_schedule_is_in_the_readme():
    for command in cli.commands:
        assert f"dynrank-fx {command}" in README
    for schedule in ("auto", "always", "warm_up", "interleave", "aligned", "join", "paper_cifar10", "paper_cifar100"):
        assert schedule in README
        assert callable(getattr(dr.schedules, schedule))
    assert "2508.08625" in README


def test_the_demo_does_the_whole_job(samples, tmp_path, capsys):
    demo = runpy.run_path(str(samples / "demo.py"), run_name="demo")
    demo["main"](tmp_path, epochs=3, compiled=False)
    printed = capsys.readouterr().out
    for word in ("sites factored", "agrees with PyTorch", "truncated / dense", "accuracy", "latency, batch 1", "drew"):
        assert word in printed
    assert {p.name for p in tmp_path.iterdir()} == {"dense.onnx", "truncated.onnx", "ranks.png"}


def test_own_loop_learns(samples):
    assert runpy.run_path(str(samples / "own_loop.py"), run_name="own_loop")["main"](2) < 1.0


def test_pipeline_shows_the_factors_as_nodes(samples):
    targets = runpy.run_path(str(samples / "pipeline.py"), run_name="pipeline")["main"]()
    assert {"0.left", "0.right", "3.left", "3.right"} <= set(targets)
