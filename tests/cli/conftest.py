"""A tiny model file, and the commands run on it in an empty folder."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import pytest
from click.testing import CliRunner, Result

from dynrank_fx.cli.main import cli

MODEL_FILE = """
    import os, random, signal
    import numpy as np
    import torch
    import torch.nn.functional as F
    from torch import nn
    from torch.utils.data import DataLoader, Dataset

    epochs = 4

    def model():
        return nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(),
            nn.Linear(256, 32), nn.Dropout(0.2), nn.Linear(32, 8),
        )

    def example_inputs():
        return (torch.zeros(2, 3, 4, 4),)

    class Noisy(Dataset):
        def __len__(self):
            return 21
        def __getitem__(self, i):
            x = torch.sin(torch.arange(48.0) * (i + 1)).view(3, 4, 4)
            return x * random.uniform(0.5, 1.5) + float(np.random.randn()) * 0.1 + torch.randn(3, 4, 4) * 0.1, i % 8

    def train_data():
        return DataLoader(Noisy(), 8, shuffle=True, num_workers=int(os.environ.get("WORKERS", 0)))

    def eval_data():
        return [(torch.linspace(-1, 1, 240).view(5, 3, 4, 4), torch.arange(5))]

    steps = 0

    def loss(output, batch):
        # What the tests of a stop set: the call at which a signal arrives, which, how often, and where (0: everywhere).
        global steps
        steps += 1
        if steps == int(os.environ.get("STOP_AT", 0)):
            for _ in range(int(os.environ.get("STOPS", 1))):
                to = int(os.environ.get("STOP_PROCESS", os.getpid()))
                os.kill(to, int(os.environ.get("STOP_BY", signal.SIGINT)))
        return F.cross_entropy(output, batch[1])

    def metric(output, batch):
        return (output.argmax(1) == batch[1]).float().mean()

    def optimizer(parameters):
        return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, nesterov=True)

    def lr_scheduler(optimizer):
        return torch.optim.lr_scheduler.MultiStepLR(optimizer, [3], 0.5)
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The empty folder in which every command runs."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("STOP")]:
        monkeypatch.delenv(name)
    return tmp_path


@pytest.fixture
def write(folder: Path) -> Callable[..., str]:
    """Write a model file with more lines, or altered ones, at its end."""

    def write(more: str = "", name: str = "model.py") -> str:
        (folder / name).write_text(dedent(MODEL_FILE) + dedent(more))
        return name

    return write


_MADE: dict[str, Path] = {}


@pytest.fixture
def once(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., None]:
    """Make files in the folder, by a name: the first time by what is given, and from then on by copying."""

    def once(name: str, make: Callable[[], object]) -> None:
        if name in _MADE:
            shutil.copytree(_MADE[name], folder, dirs_exist_ok=True)
        else:
            make()
            _MADE[name] = Path(shutil.copytree(folder, tmp_path_factory.mktemp("made") / "copy"))

    return once


Invoke = Callable[..., Result]
# So small a network is nothing but stem and classifier.
DEFAULTS = {name: {"leave": ("none",)} for name in ("transform", "pilot", "train")}


def invoke(*args: str) -> Result:
    """A command that is expected to succeed, or to fail in words."""
    result = CliRunner().invoke(cli, args, default_map=DEFAULTS)
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert "Traceback" not in result.output
    return result


@pytest.fixture
def run() -> Invoke:
    """The output and error output of a command that succeeds."""

    def run(*args: str) -> Result:
        result = invoke(*args)
        assert result.exit_code == 0, result.output
        return result

    return run


@pytest.fixture
def refused() -> Callable[..., str]:
    """The sentence of a command that fails, which is all that its error output says."""

    def refused(*args: str, noisy: bool = False) -> str:
        result = invoke(*args)
        assert result.exit_code in (1, 2), result.output
        *usage, sentence = result.stderr.strip().splitlines()
        assert sentence.startswith("Error: ")
        told = re.compile(r"Usage: |Try |Warning: |running |\[ *\d+ s\] |$")  # the times are of what is being done
        assert noisy or all(told.match(line) for line in usage)
        return sentence.removeprefix("Error: ")

    return refused
