"""The commands under torchrun: two processes train as one, killed ones come back, and what is of one is refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch
from click import UsageError
from click.testing import CliRunner, Result

from dynrank_fx.cli import several
from dynrank_fx.cli.main import cli
from dynrank_fx.errors import StoreError
from dynrank_fx.training import read_run

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
TRAIN = ["-m", "dynrank_fx.cli", "train", "model.py", "--out"]
OPTIONS = ["--no-compile", "--schedule", "interleave", "--low", "1", "--leave", "none", "--checkpoint-steps", "2"]

TOLD = {
    "RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "1",
    "TORCHELASTIC_RESTART_COUNT": "2",
    "TORCHELASTIC_RUN_ID": "job",
    "GROUP_WORLD_SIZE": "2",
}

# What the processes are to suffer is in PLAN: in which start, at which call of loss() in process 1, or in the only one,
# and what.
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
            if (rank, start, calls) == (int(os.environ.get("WORLD_SIZE", 1)) > 1, int(when), int(call)):
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


def torchrun(
    *options: str, out: str, count: int = 2, last: Sequence[str] = (), seconds: float = 200, **more: str
) -> subprocess.CompletedProcess[str]:
    """Processes that train into a folder; none is there afterwards. options: of torchrun. last: of the command."""
    command = [*TORCHRUN, str(count), *options, *TRAIN, out, *OPTIONS, *last]
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
    each = [[record[key] for key in ("loss", "metric", "eval_loss", "eval_metric")] for record in history]
    return [*each, list(history[-1]["truncated"].values())]


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
    again = "torchrun --standalone --nproc-per-node 2 -m dynrank_fx.cli train model.py --out two --resume"
    assert said.count(f"and saved; go on with: {again}") == 1
    assert {path.name for path in Path("two").iterdir()} == {"checkpoint.safetensors", "history.jsonl", "run.json"}
    info = read_run(Path("two"))[1]
    assert (info["epoch"], info["dealt"]) == (1, "2 x 8 samples")
    assert 2 < info["step"] <= 6
    assert (
        "at a time" not in run("train", "model.py", "--out", "two", "--resume").output
    )  # its batches are twice as large
    run("train", "model.py", *OPTIONS, "--out", "one")
    check_near("two", "one")
    torch.testing.assert_close(figures("two"), figures("one"), rtol=1e-5, atol=1e-6)


@pytest.mark.fuzz
def test_unlike_models_are_refused_before_there_is_a_run(model_file: Path) -> None:
    """Of parts nobody could tell that they are of other wholes. Every day test_sharding.py, of phases, sees to that."""
    text = model_file.read_text()
    model_file.write_text(text.replace("def model():\n", "def model():\n    torch.manual_seed(rank)\n"))
    ended = torchrun(out="two", last=["--fsdp"])
    assert ended.returncode != 0
    assert ended.stdout.count("Error: 0.weight is not the same in all processes, in process 1 of 2 it is another") == 1
    assert not Path("two").exists()


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., several.Launched]]:
    """What a process sees that torchrun has started."""

    def told(**changed: str) -> several.Launched:
        for name, value in (TOLD | changed).items():
            monkeypatch.setenv(name, value)
        launch = several.launched()
        assert launch is not None
        return launch

    yield told
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def test_who_a_process_is(told: Callable[..., several.Launched], monkeypatch: pytest.MonkeyPatch) -> None:
    assert several.launched() is None
    assert several.is_first()
    assert told() == several.Launched(rank=1, count=4, local=1, locally=2, restarts=2, job="job", parent=os.getppid())
    assert not several.is_first()
    on_one = told(GROUP_WORLD_SIZE="1")
    assert on_one.job.startswith("job ")
    assert str(os.getppid()) in on_one.job.split()
    assert told(RANK="0").rank == 0
    assert several.is_first()


@pytest.mark.parametrize(
    "command", ["transform", "pilot", "compress", "export", "report", "inspect", "verify", "bench"]
)
def test_a_command_of_one_process_is_refused(
    command: str, told: Callable[..., several.Launched], refused: Callable[..., str]
) -> None:
    told(RANK="0")
    assert refused(command, "model.py") == (
        f"torchrun started 4 processes, and {command} is the work of one: start it as `dynrank-fx {command} ...`"
    )
    told()
    result = CliRunner().invoke(cli, [command, "model.py"])
    assert (result.exit_code, result.output) == (2, "")


def test_one_process_of_torchrun_runs_every_command(
    told: Callable[..., several.Launched], run: Any, write: Any
) -> None:
    told(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    assert "3 sites" in run("transform", write(), "--dry-run", "--leave", "none").stdout


def test_who_has_lost_torchrun_stops(told: Callable[..., several.Launched]) -> None:
    assert several.wish_to_stop([], None) == several.wish_to_stop([], told()) == 0
    assert several.wish_to_stop([2, 15], told()) == 2
    assert several.wish_to_stop([], replace(told(), parent=1)) == signal.SIGHUP


def test_each_process_has_a_device(told: Callable[..., several.Launched], monkeypatch: pytest.MonkeyPatch) -> None:
    assert several.device_of(None, None) == "cpu"
    assert several.device_of("cuda:1", None) == "cuda:1"
    launch, chosen = told(), list[int]()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for gpus, given, device in ((2, None, "cuda:1"), (1, None, "cpu"), (2, "cuda", "cuda:1"), (2, "cpu", "cpu")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=gpus: count)
        assert several.device_of(given, launch) == device
    assert chosen == [1, 1]
    with pytest.raises(UsageError, match="--device cuda:0 is one device, and torchrun gives each process its own: say"):
        several.device_of("cuda:0", launch)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UsageError, match="torchrun started 2 processes here, and this machine has 1 GPUs: start as "):
        several.device_of("cuda", launch)


def test_what_another_process_tells_is_not_told_again(told: Callable[..., several.Launched]) -> None:
    gone = RuntimeError("[..]/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4")
    assert several.of_another(gone) is None  # there is no other
    told()
    assert isinstance(several.of_another(gone), several.OfAnotherError)
    blamed = ValueError("the backward pass failed")
    blamed.__cause__ = gone
    assert isinstance(several.of_another(blamed), several.OfAnotherError)
    assert several.of_another(ValueError("of its own")) is None
    theirs = "saving failed in process 0 of 2, and nothing was done in any: the disk is full"
    assert isinstance(several.of_another(StoreError(theirs)), several.OfAnotherError)


def test_parts_are_of_several(write: Any, refused: Callable[..., str]) -> None:
    assert refused("train", write(), "--fsdp") == (
        "--fsdp shares the parameters among processes: start them by torchrun"
    )


def test_a_restart_goes_on_with_its_own_run_only(
    told: Callable[..., several.Launched], model_file: Path, run: Callable[..., Result], refused: Callable[..., str]
) -> None:
    """Here of one process, whose group needs a port: that which the system gives."""
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GROUP_WORLD_SIZE": "1"}
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    alone |= {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    command = ["train", "model.py", *OPTIONS, "--epochs", "1", "--out", "r"]
    told(**alone, TORCHELASTIC_RESTART_COUNT="0")
    run(*command)
    told(**alone, TORCHELASTIC_RESTART_COUNT="1")
    assert "r has its " in run(*command).stdout
    assert refused(*command, "--seed", "3").startswith("r holds a run already: add --resume")
    torch.distributed.destroy_process_group()
    told(**alone | {"TORCHELASTIC_RUN_ID": "another"}, TORCHELASTIC_RESTART_COUNT="1")
    assert refused(*command).startswith("r holds a run already: add --resume")


@pytest.mark.gpu
def test_gpus_train_as_the_cpu_does(model_file: Path, run: Callable[..., Result]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("this machine has no GPU")
    run("train", "model.py", *OPTIONS, "--out", "one")
    count = min(torch.cuda.device_count(), 4)
    for name, last in (("together", []), ("in-parts", ["--fsdp"])):
        done = torchrun(out=name, count=count - count % 2 or 1, last=last)
        assert done.returncode == 0, done.stdout
        torch.testing.assert_close(weights(name), weights("one"), rtol=1e-3, atol=1e-4)
    run("train", "model.py", "--device", "cpu", "--out", "in-parts", "--resume")


@pytest.mark.fuzz
@pytest.mark.parametrize("parts", [[], ["--fsdp"]])
def test_thirty_kills_lose_nothing(model_file: Path, parts: list[str]) -> None:
    """At random moments of training, each in one of two processes, while steps, switches and saves go on."""
    alone = torchrun(out="whole", EPOCHS="150", last=parts, seconds=900)
    assert alone.returncode == 0, alone.stdout
    done = torchrun("--max-restarts", "40", out="killed-run", EPOCHS="150", KILLS="30", last=parts, seconds=3000)
    assert done.returncode == 0, done.stdout
    killed = Path("killed").read_text().splitlines()
    print(*killed, sep="\n")
    assert len(killed) == 30
    torch.testing.assert_close(weights("killed-run"), weights("whole"), rtol=0, atol=0)
    assert figures("killed-run") == figures("whole")


@pytest.mark.fuzz
def test_one_two_four_and_one_process_go_on_with_one_run(model_file: Path, run: Callable[..., Result]) -> None:
    """Each is told to end in the midst of an epoch, and as many samples make a step throughout."""
    run("train", "model.py", *OPTIONS, "--out", "one")
    stopped = torchrun(out="many", count=1, PLAN="0:5:term")
    assert "and saved; go on with" in stopped.stdout
    for count, last in ((2, []), (4, ["--fsdp"])):
        stopped = torchrun(out="many", count=count, last=["--resume", *last], PLAN="0:7:term")
        assert "and saved; go on with" in stopped.stdout, stopped.stdout
    run("train", "model.py", "--out", "many", "--resume")
    check_near("many", "one")
    torch.testing.assert_close(figures("many"), figures("one"), rtol=1e-5, atol=1e-6)
