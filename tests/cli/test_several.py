"""The commands under torchrun: two processes train as one, killed ones come back, and what is of one is refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from click.testing import Result

from dynrank_fx.training import read_run

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
TRAIN = ["-m", "dynrank_fx.cli", "train", "model.py", "--out"]
OPTIONS = ["--no-compile", "--schedule", "interleave", "--low", "1", "--leave", "none", "--checkpoint-steps", "2"]

# What the processes are to suffer is in PLAN: in which start, at which call of loss() in process 1, and what.
MODEL = """
    import os, random, signal, sys, threading
    import torch
    import torch.nn.functional as F
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset

    epochs = int(os.environ.get("EPOCHS", 4))
    DRAWN = torch.Generator().manual_seed(5)
    X = torch.randn(96, 24, generator=DRAWN)
    Y = torch.tanh(X @ torch.randn(24, 8, generator=DRAWN))
    SIZE = 16 // int(os.environ.get("WORLD_SIZE", 1))

    def model():
        return nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 8))

    def example_inputs():
        return (torch.zeros(2, 24),)

    def train_data():
        return DataLoader(TensorDataset(X, Y), SIZE, shuffle=True)

    def eval_data():
        return DataLoader(TensorDataset(X[:33], Y[:33]), 8)

    def metric(output, batch):
        return (output.sign() == batch[1].sign()).float().mean()

    def optimizer(parameters):
        return torch.optim.AdamW(parameters, lr=1e-3)

    calls = 0
    start, rank = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)), int(os.environ.get("RANK", 0))

    def loss(output, batch):
        global calls
        calls += 1
        for suffered in filter(None, os.environ.get("PLAN", "").split()):
            when, call, what = suffered.split(":")
            if (rank, start, calls) == (1, int(when), int(call)):
                os.kill(os.getpid() if what == "kill" else os.getppid(), getattr(signal, f"SIG{what.upper()}"))
        if calls == 1 and start < int(os.environ.get("KILLS", 0)):
            drawn = random.Random(start)
            if rank == drawn.randrange(2):
                threading.Timer(drawn.uniform(0, 0.8), die).start()
        return F.mse_loss(output, batch[1])

    def die():
        frame, doing = sys._current_frames()[threading.main_thread().ident], []
        while frame is not None:
            doing.append(frame.f_code.co_name)
            frame = frame.f_back
        with open("killed", "a") as file:
            print(start, rank, *doing[:-8], file=file, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def model_file(folder: Path) -> Path:
    path = folder / "model.py"
    path.write_text(dedent(MODEL))
    return path


def torchrun(*options: str, out: str, seconds: float = 200, **more: str) -> subprocess.CompletedProcess[str]:
    """Two processes that train into a folder; none is there afterwards."""
    command = [*TORCHRUN, *options, *TRAIN, out, *OPTIONS]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DYNRANK_TEST": out} | more
    started = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )
    try:
        said, _ = started.communicate(timeout=seconds)
    finally:
        left = children_of(out)
        for each in [*left, started.pid]:
            with suppress(ProcessLookupError):
                os.kill(each, signal.SIGKILL)
    assert not left, said
    return subprocess.CompletedProcess(command, started.returncode, said)


def children_of(out: str) -> list[int]:
    """The processes that were started for this folder and are alive."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            environment, about = (path / "environ").read_bytes(), (path / "stat").read_text()
        except OSError:
            continue
        ended = about.rpartition(")")[2].split()[0] == "Z"
        if f"DYNRANK_TEST={out}\0".encode() in environment and not ended:
            found.append(int(path.name))
    return found


def weights(folder: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in read_run(Path(folder))[0].items() if name.startswith("net.")}


def check_near(folder: str, other: str) -> None:
    torch.testing.assert_close(weights(folder), weights(other), rtol=1e-5, atol=1e-6)


def figures(folder: str) -> list[list[float]]:
    history = read_run(Path(folder))[1]["history"]
    return [[each[key] for key in ("loss", "metric", "eval_loss", "eval_metric")] for each in history]


def test_a_killed_process_comes_back_and_a_stopped_job_says_how_to_go_on(
    model_file: Path, run: Callable[..., Result]
) -> None:
    """Of two processes one is killed, and torchrun starts both anew; then torchrun is told to end, as of a job that
    another takes the place of. One process ends what they have begun.
    """
    done = torchrun("--max-restarts", "1", out="two", PLAN="0:9:kill 1:5:term")
    said = done.stdout
    assert "3 sites; schedule Interleave(low=1, full=1); 4 epochs; 2 processes, cpu" in said
    assert said.count("epoch 1/4") == 1  # one process prints, and one start trained it
    assert said.count("stopping after this step") == 1
    told = "and saved; go on with: torchrun --nproc-per-node 2 -m dynrank_fx.cli train model.py --out two --resume"
    assert said.count(told) == 1
    assert {path.name for path in Path("two").iterdir()} == {"checkpoint.safetensors", "history.jsonl", "run.json"}
    info = read_run(Path("two"))[1]
    assert (info["epoch"], info["dealt"]) == (1, "2 x 8 samples")
    assert 2 < info["step"] <= 6
    run("train", "model.py", "--out", "two", "--resume")
    run("train", "model.py", *OPTIONS, "--out", "one")
    check_near("two", "one")
    torch.testing.assert_close(figures("two"), figures("one"), rtol=1e-5, atol=1e-6)


@pytest.mark.fuzz
def test_thirty_kills_lose_nothing(model_file: Path) -> None:
    """At random moments of training, each in one of two processes, while steps, switches and saves go on."""
    alone = torchrun(out="whole", EPOCHS="150", seconds=600)
    assert alone.returncode == 0, alone.stdout
    done = torchrun("--max-restarts", "40", out="killed-run", EPOCHS="150", KILLS="30", seconds=3000)
    assert done.returncode == 0, done.stdout
    killed = Path("killed").read_text().splitlines()
    print(*killed, sep="\n")
    assert len(killed) == 30
    torch.testing.assert_close(weights("killed-run"), weights("whole"), rtol=0, atol=0)
    assert figures("killed-run") == figures("whole")
