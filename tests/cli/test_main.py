"""The command line as a whole: its options, its help, and what becomes of errors."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

import dynrank_fx
import dynrank_fx.phases as phases
from dynrank_fx.cli.main import cli

OPTIONS = {
    "transform": [
        "--amp",
        "--capture",
        "--compile",
        "--device",
        "--dry-run",
        "--energy",
        "--exclude",
        "--form",
        "--help",
        "--include",
        "--json",
        "--layout",
        "--leave",
        "--measure",
        "--multiple-of",
        "--no-compile",
        "--out",
        "--override",
        "--plan",
        "--rank",
        "--share-inputs",
        "--weights",
        "-h",
        "-o",
    ],
    "pilot": [
        "--amp",
        "--capture",
        "--cost-by",
        "--device",
        "--energy",
        "--exclude",
        "--factor-steps",
        "--form",
        "--help",
        "--include",
        "--json",
        "--layout",
        "--leave",
        "--measure",
        "--multiple-of",
        "--no-compile",
        "--override",
        "--plan",
        "--rank",
        "--seed",
        "--share-inputs",
        "--steps",
        "--weights",
        "-h",
    ],
    "train": [
        "--accumulate",
        "--activation-memory",
        "--amp",
        "--capture",
        "--carry",
        "--checkpoint-steps",
        "--clip",
        "--compile",
        "--cost",
        "--cost-by",
        "--decay",
        "--deflate",
        "--device",
        "--energy",
        "--epochs",
        "--exclude",
        "--factor-steps",
        "--form",
        "--from",
        "--fsdp",
        "--full",
        "--help",
        "--include",
        "--init",
        "--json",
        "--landing",
        "--layout",
        "--leave",
        "--low",
        "--lr-milestones",
        "--measure",
        "--multiple-of",
        "--no-compile",
        "--out",
        "--override",
        "--pilot",
        "--plan",
        "--rank",
        "--resume",
        "--rewarm",
        "--schedule",
        "--seed",
        "--share-inputs",
        "--steps",
        "--tensorboard",
        "--weights",
        "--workers",
        "-h",
    ],
    "report": ["--against", "--help", "--json", "--out", "-h", "-o"],
    "export": [
        "--batch",
        "--calibrate",
        "--dynamic",
        "--external-data",
        "--help",
        "--input-name",
        "--json",
        "--model",
        "--never-slower",
        "--no-timing",
        "--opset",
        "--out",
        "--output-name",
        "--precision",
        "--provider",
        "--weights",
        "-h",
        "-o",
    ],
    "inspect": ["--capture", "--help", "--json", "--model", "--plot", "--weights", "-h"],
    "compress": [
        "--batch",
        "--budget",
        "--calibrate",
        "--capture",
        "--dynamic",
        "--exclude",
        "--external-data",
        "--form",
        "--help",
        "--include",
        "--input-name",
        "--json",
        "--leave",
        "--model",
        "--multiple-of",
        "--no-timing",
        "--opset",
        "--out",
        "--output-name",
        "--precision",
        "--provider",
        "--recover-by",
        "--recover-steps",
        "--sequential",
        "--share-inputs",
        "--weights",
        "-h",
        "-o",
    ],
    "verify": [
        "--batch",
        "--calibrate",
        "--help",
        "--json",
        "--metric",
        "--model",
        "--provider",
        "--tolerance",
        "--weights",
        "-h",
    ],
    "bench": ["--against", "--batch", "--help", "--json", "--provider", "--provider-option", "--repeats", "-h"],
}


def command(name: str) -> click.Command:
    return cli.commands[name]


def test_the_commands() -> None:
    names = ["transform", "pilot", "train", "report", "export", "inspect", "compress", "verify", "bench"]
    assert list(cli.commands) == names


@pytest.mark.parametrize("name", OPTIONS)
def test_the_options_of_a_command(name: str) -> None:
    context = click.Context(command(name), info_name=name, parent=click.Context(cli, **cli.context_settings))
    found = [opt for p in command(name).get_params(context) for opt in p.opts if isinstance(p, click.Option)]
    assert sorted(found) == OPTIONS[name]


@pytest.mark.parametrize("name", OPTIONS)
def test_the_help_explains_every_option_and_has_an_example_that_parses(name: str) -> None:
    result = CliRunner().invoke(cli, [name, "--help"], prog_name="dynrank-fx")
    assert result.exit_code == 0
    for parameter in command(name).params:
        if isinstance(parameter, click.Option):
            assert parameter.opts[0] in result.output
            assert parameter.help or parameter.name == "seed"
    _, found, after = result.output.partition("Example:\n")
    assert found
    program, used, *args = shlex.split(after.strip().splitlines()[0])
    assert (program, used) == ("dynrank-fx", name)
    assert command(name).make_context(name, args).params


def test_the_help_of_all_names_every_command_by_an_example_that_parses() -> None:
    result = CliRunner().invoke(cli, ["-h"], prog_name="dynrank-fx")
    lines = [
        line.split("  ")[0] for line in map(str.strip, result.output.splitlines()) if line.startswith("dynrank-fx")
    ]
    assert [shlex.split(line)[1] for line in lines] == list(OPTIONS)
    for line in lines:
        _, name, *args = shlex.split(line)
        assert command(name).make_context(name, args).params


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["polish"], "No such command 'polish'."),
        (["transform"], "Missing argument 'MODEL_FILE'."),
        (["transform", "model.py", "--rang", "3"], "No such option '--rang'."),
        (["export", "run"], "Missing option '--out' / '-o'."),
        (["train", "model.py", "--epochs", "0"], "Invalid value for '--epochs': 0 is not in the range x>=1."),
        (["train", "model.py", "--rewarm", "-1"], "Invalid value for '--rewarm': -1 is not in the range x>=0."),
        (["train", "model.py", "--seed", "-1"], "Invalid value for '--seed': -1 is not in the range 0<=x<="),
        (["train", "model.py", "--amp", "fp8"], "Invalid value for '--amp': 'fp8' is not one of 'bf16', 'float16'."),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_a_command_that_cannot_be_parsed(args: list[str], sentence: str, refused: Callable[..., str]) -> None:
    assert refused(*args).startswith(sentence)


@pytest.mark.parametrize(
    "args",
    [["transform", "gone.py"], ["train", "gone.py"], ["inspect", "gone.py"]],
    ids=lambda args: args[0],
)
def test_no_such_model_file(args: list[str], refused: Callable[..., str]) -> None:
    assert refused(*args) == "gone.py does not exist: give the Python file that has model()"


@pytest.mark.parametrize("args", [["export", "gone", "-o", "x.onnx"], ["inspect", "gone"]], ids=lambda args: args[0])
def test_no_such_run(args: list[str], refused: Callable[..., str]) -> None:
    assert refused(*args).startswith("there is no folder gone: give a run of `dynrank-fx train`")


def test_an_error_of_ours_keeps_its_traceback(
    write: Callable[..., str], monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    def broken(*args: Any) -> None:
        raise KeyError("a mistake of ours")

    monkeypatch.setattr(phases, "save", broken)
    result = CliRunner().invoke(cli, ["transform", write()])
    assert isinstance(result.exception, KeyError)
    assert result.exit_code == 1


def test_the_installed_command_tells_a_mistake_without_a_traceback(folder: Path) -> None:
    installed = Path(sys.executable).with_name("dynrank-fx")
    done = subprocess.run([installed, "transform", "gone.py"], capture_output=True, text=True, cwd=folder)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "Error: gone.py does not exist: give the Python file that has model()\n"


def test_the_package_of_the_commands_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dynrank_fx.cli", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == f"dynrank-fx, version {dynrank_fx.__version__}"
