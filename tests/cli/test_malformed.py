"""Every option of every command with malformed values: one sentence, an exit code that says so, and no file."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from dynrank_fx.cli.main import cli

MODEL_FILE = """
import torch
from torch import nn

X, Y = torch.ones(8, 16), torch.arange(8) % 4

def model():
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))

def example_inputs():
    return (X[:2],)

def train_data():
    return [(X, Y)]

def loss(output, batch):
    return nn.functional.cross_entropy(output, batch[-1])
"""

SOUND = {  # each works as it is
    "transform": ("model.py", "--out", "new", "--leave", "none"),
    "train": ("model.py", "--out", "new", "--leave", "none", "--epochs", "1", "--no-compile"),
    "pilot": ("model.py", "--leave", "none", "--steps", "20", "--no-compile"),
    "report": ("run", "--out", "new.html"),
    "export": ("model.py", "--out", "new.onnx"),
    "inspect": ("model.py",),
    "compress": ("model.py", "--budget", "params=0.6", "--no-timing", "--out", "new.pt"),
    "verify": ("a.onnx", "a.onnx"),
    "bench": ("a.onnx", "--repeats", "5"),
}

NUMBERS = ("junk", "", "1.5", "nan", "1e3", "0x10", "--", "-1", "½")
FLOATS = ("junk", "", "nan", "inf", "-inf", "-1", "1,5", "0.5.5")
PATHS = ("", "n" * 300, "n" * 5000, "gone/" * 30 + "n" * 300)
TEXTS = {
    "rank": ("junk", "", "0", "-1", "0.0", "1.5", "nan", "1e3", "-0.5", "inf"),
    "include": ("", "gone", "[", "0.bias"),
    "exclude": ("", "gone", "[", "0.bias"),
    "override": (
        *("", "junk", "=", "0.weight", "0.weight=", "=dense", "0.weight=junk", "0.weight=1,5", "gone=dense"),
        *("0.weight=dense,dense", "0.weight=-1", "0.weight=0", "0.weight=1.5", "0.weight=spatial,cp", "0.weight=5,"),
    ),
    "lr_milestones": ("", "junk", "1,", ",", "1;2", "-1", "0.5"),
    "device": ("", "junk", "meta", "cuda:99", "cpu:x", "hpu"),
    "budgets": (
        *("", "junk", "params", "params=", "params=junk", "params=0", "params=-1", "params=2", "params=nan"),
        *("params=inf", "flops=1.5", "latency=x", "max_drop=-1", "max_drop=nan", "max_drop=0.01", "speed=0.5"),
    ),
    "provider": ("", "junk", "cpu", "CUDA"),
    "settings": ("", "junk", "=", "a=", "=1"),
    "dynamic": ("", "junk", "x:0", "x=0", ":0=batch", "input:x=batch", "gone:0=batch", "input:9=batch", "input:0=1a"),
    "inputs": ("", "x"),
    "outputs": ("",),
}
SAME = {  # what is no mistake
    ("seed", "1e3"),
    ("clip", "inf"),
    ("inputs", "x"),
}


def malformed(parameter: click.Parameter) -> tuple[str, ...]:
    """Values that an option cannot have."""
    kind = parameter.type
    if parameter.name in TEXTS:
        return TEXTS[parameter.name]
    if isinstance(kind, click.Choice):
        return ("junk", "", "0")
    if isinstance(kind, click.types.FuncParamType):
        return PATHS
    if isinstance(kind, click.types.IntParamType):
        return NUMBERS if getattr(kind, "min", 0) is not None else NUMBERS[:7]
    assert isinstance(kind, click.types.FloatParamType), parameter
    return FLOATS


def of_a_command(name: str) -> list[tuple[str, str]]:
    """Its options, each with a malformed value."""
    options = [each for each in cli.commands[name].params if isinstance(each, click.Option) and not each.is_flag]
    return [(each.opts[0], value) for each in options for value in malformed(each) if (each.name, value) not in SAME]


OF_THE_MODEL = {"include", "exclude", "override", "budgets", "dynamic", "inputs", "outputs"}
"""Options whose values may be well formed and fit no model, which is no mistake in using the command."""

CASES = [(name, flag, value) for name in SOUND for flag, value in of_a_command(name)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model file, an ONNX file and a run."""
    folder = tmp_path_factory.mktemp("malformed")
    (folder / "model.py").write_text(MODEL_FILE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for args in (
            ("export", "model.py", "--out", "a.onnx"),
            ("train", *SOUND["train"][:2], "run", *SOUND["train"][3:]),
        ):
            assert CliRunner().invoke(cli, args).exit_code == 0
    return folder


@pytest.fixture(autouse=True)
def inside(made: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(made)
    with warnings.catch_warnings():  # the command's own way of telling them stays within
        yield


def wrong_with(args: tuple[str, ...], codes: tuple[int, ...] = (1, 2)) -> str:
    """What is wrong with the refusal of a command, or "" for a sentence that leaves no file."""
    before = sorted(Path().rglob("*"))
    result = CliRunner().invoke(cli, args)
    lines = result.stderr.strip().splitlines()
    left = [path for path in Path().rglob("*") if path not in before]
    for path in Path().glob("[ng]*"):  # it would be in the way of the next
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        return f"raised {result.exception!r}"
    if result.exit_code not in codes:
        return f"ended with {result.exit_code}"
    if not lines or not lines[-1].startswith("Error: "):
        return f"said {lines[-1:]}"
    return f"left {left[0]}" if left else ""


@pytest.mark.parametrize("name", SOUND)
def test_a_malformed_option_is_one_sentence(name: str) -> None:
    free = {each.opts[0] for each in cli.commands[name].params if each.name in OF_THE_MODEL}
    wrong = {
        (flag, value[:20]): said
        for command, flag, value in CASES
        if command == name and (said := wrong_with((name, *SOUND[name], flag, value), (1, 2) if flag in free else (2,)))
    }
    assert not wrong


@pytest.mark.parametrize("name", SOUND)
def test_a_malformed_argument_is_one_sentence(name: str) -> None:
    _, *options = SOUND[name]
    values = (*PATHS, "gone", "gone.py", "gone.onnx", "empty.onnx", "empty.py", "text.py", ".", "model.py/x", "\n")
    Path("empty.onnx").touch()
    Path("empty.py").touch()
    Path("text.py").write_text("not Python")
    wrong = {value[:20]: said for value in values if (said := wrong_with((name, value, *options)))}
    assert not wrong
