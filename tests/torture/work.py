"""A command in a process of its own, forked from one that has torch already, and what became of it."""

from __future__ import annotations

import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path

import click

from dynrank_fx.cli.main import cli
from dynrank_fx.errors import DynrankError

MODEL = Path(__file__).with_name("model.py")


@dataclass(frozen=True)
class Outcome:
    """What became of a piece of work.

    kind: ``done``, ``refused`` (a sentence and a non-zero exit), ``traceback`` (ours), ``killed``, ``crashed`` (by a
    signal that nobody sent) or ``late``. value: what the work returned. said: the sentence, or the traceback.
    """

    kind: str
    value: object = None
    said: str = ""


def command(*arguments: object) -> str:
    """Run a command of ``dynrank-fx`` in this process; what it printed. Raises ClickException for what it refuses."""
    with tempfile.TemporaryFile("w+") as out, redirect_stdout(out), redirect_stderr(out):
        try:
            cli.main([str(each) for each in arguments], prog_name="dynrank-fx", standalone_mode=False)
        except SystemExit as error:
            if error.code:
                out.seek(0)
                raise click.ClickException(out.read()) from error
        out.seek(0)
        return out.read()


def apart(work: Callable[[], object], seconds: float = 120, kill_after: float | None = None) -> Outcome:
    """Do ``work`` in a forked process. kill_after: seconds until it is killed. seconds: how long it may take."""
    with tempfile.NamedTemporaryFile() as file:
        child = os.fork()
        if child == 0:
            _report(work, file.name)
        return _awaited(child, seconds, kill_after, Path(file.name))


def _report(work: Callable[[], object], path: str) -> None:
    """In the child: never returns."""
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    try:
        outcome = Outcome("done", work())
    except (click.ClickException, DynrankError) as error:
        outcome = Outcome("refused", said=getattr(error, "message", str(error)))
    except BaseException:  # whatever it is, it is what the campaign looks for
        outcome = Outcome("traceback", said=traceback.format_exc())
    with open(path, "wb") as file:
        pickle.dump(outcome, file)
        file.flush()
    os._exit(0)


def _awaited(child: int, seconds: float, kill_after: float | None, file: Path) -> Outcome:
    end = time.monotonic() + (seconds if kill_after is None else kill_after)
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return Outcome("late" if kill_after is None else "killed")
        time.sleep(0.002)
    if os.WIFSIGNALED(status):
        return Outcome("killed" if os.WTERMSIG(status) == signal.SIGKILL else "crashed", said=f"signal {status}")
    outcome: Outcome = pickle.loads(file.read_bytes())
    return outcome


def warm_up(light: bool = False) -> None:
    """Import and read what every child would do again: it makes children ten times as fast. No gradients are computed
    here, since a process that has is not to be forked. light: nothing will be exported to ONNX.
    """
    import importlib
    import pkgutil
    import sys

    import onnxruntime  # noqa: F401
    import torch

    sys.path.append(str(Path(__file__).parents[1] / "zoo"))
    importlib.import_module("schemas")  # before torchvision, which the trainers import

    import dynrank_fx

    torch.set_num_threads(1)
    for module in pkgutil.walk_packages(dynrank_fx.__path__, "dynrank_fx."):
        if not module.name.endswith("__main__"):
            with suppress(ImportError):  # of trainers that are not installed
                importlib.import_module(module.name)
    assert "torch" in sys.modules
    if light:
        return
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(None), torch.no_grad():
        program = torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),))
        torch.onnx.export(program, dynamo=True, verbose=False).save(Path(folder, "m.onnx"))
