"""Kill commands on both sides of everything they do to files, and at random moments; then go on, and compare."""

from __future__ import annotations

import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from safetensors.torch import load_file
from work import MODEL, Outcome, apart, command

from dynrank_fx.training import read_run

CALLS = ("replace", "rename", "unlink", "remove", "rmdir", "mkdir", "fsync", "link", "symlink")
"""What of ``os`` changes files, or makes a change last."""


@dataclass(frozen=True)
class Job:
    """Something to be killed.

    prepare: makes what is there before. work: the command. again: what a user does after a kill. result: what counts
    in the end. All are given a folder. exports: to ONNX.
    """

    name: str
    prepare: Callable[[Path], object]
    work: Callable[[Path], object]
    again: Callable[[Path], object]
    result: Callable[[Path], object]
    exports: bool = False


@dataclass(frozen=True)
class Kill:
    """One kill: the job, when it was killed, and what is wrong with what came of it ('' where nothing is)."""

    job: str
    moment: str
    wrong: str


def _nothing(folder: Path) -> None:
    """There is nothing before."""


def _train(folder: Path) -> None:
    command("train", MODEL, "--rank", 0.25, "--schedule", "interleave", "--no-compile", "--checkpoint-steps", 2,
            "--out", folder / "run")  # fmt: skip


def _go_on(folder: Path) -> None:
    if (folder / "run" / "run.json").exists():
        command("train", MODEL, "--out", folder / "run", "--resume")
    else:
        _train(folder)


def _trained(folder: Path) -> object:
    tensors, info = read_run(folder / "run")
    return {name: _bits(tensor) for name, tensor in tensors.items()}, [_timeless(each) for each in info["history"]]


def _timeless(record: dict[str, Any]) -> dict[str, Any]:
    """What is the same every time."""
    return {key: value for key, value in record.items() if key != "memory" and "seconds" not in key}


def _bits(tensor: torch.Tensor) -> tuple[str, bytes]:
    return str(tensor.dtype), tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _transform(rank: int) -> Callable[[Path], object]:
    return lambda folder: command("transform", MODEL, "--rank", rank, "--out", folder / "net")


def _transformed(folder: Path) -> object:
    command("inspect", folder / "net", "--model", MODEL)
    tensors = load_file(folder / "net" / "weights.safetensors")
    return {name: _bits(tensor) for name, tensor in tensors.items()}, (folder / "net" / "plan.json").read_bytes()


def _export(folder: Path) -> object:
    return command("export", MODEL, "--external-data", "-o", folder / "m.onnx")


def _exported(folder: Path) -> object:
    command("verify", folder / "m.onnx", MODEL)
    return _initializers(folder)


def _initializers(folder: Path) -> object:
    return sorted(each.raw_data for each in onnx.load(folder / "m.onnx").graph.initializer)


def _compress(name: str) -> Callable[[Path], object]:
    return lambda folder: command("compress", MODEL, "--budget", "params=0.6", "--no-timing", "-o", folder / name)


def _compressed(folder: Path) -> object:
    module = torch.load(folder / "m.pt", weights_only=False)
    return {name: _bits(tensor) for name, tensor in module.state_dict().items()}


JOBS = (
    Job("train", _nothing, _train, _go_on, _trained),
    Job("transform", _transform(2), _transform(4), _transform(4), _transformed),
    Job("export", _nothing, _export, _export, _exported, exports=True),
    Job("export over a file", _export, _export, _export, _exported, exports=True),
    Job("compress to .onnx", _nothing, _compress("m.onnx"), _compress("m.onnx"), _initializers, exports=True),
    Job("compress to .pt", _nothing, _compress("m.pt"), _compress("m.pt"), _compressed),
)


class _Counted:
    """Counts the two sides of every call that changes files, and kills this process at one of them."""

    def __init__(self, last: int | None) -> None:
        self.count, self.last = 0, last
        for name in CALLS:
            setattr(os, name, self._around(getattr(os, name)))

    def _around(self, call: Callable[..., object]) -> Callable[..., object]:
        def counting(*args: object, **kwargs: object) -> object:
            self._side()
            try:
                return call(*args, **kwargs)
            finally:
                self._side()

        return counting

    def _side(self) -> None:
        if self.count == self.last:
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1


@dataclass(frozen=True)
class Undisturbed:
    """A job when nobody kills it: how many sides of calls it has, the seconds it takes, and what comes of it."""

    sides: int
    seconds: float
    result: object


def undisturbed(job: Job) -> Undisturbed:
    """Do a job to its end."""

    def work(folder: Path) -> Undisturbed:
        counter, started = _Counted(None), time.monotonic()
        job.work(folder)
        sides, seconds = counter.count, time.monotonic() - started
        return Undisturbed(sides, seconds, job.result(folder))

    (outcome,) = _in_folder(job, work)
    assert isinstance(outcome.value, Undisturbed), outcome.said
    return outcome.value


def _in_folder(job: Job, *works: Callable[[Path], object], kill_after: float | None = None) -> list[Outcome]:
    """Each of the works, in a process of its own, in one new folder. kill_after: seconds, of the first of them."""
    folder = Path(tempfile.mkdtemp(prefix="torture"))
    try:
        prepared = apart(lambda: job.prepare(folder))
        assert prepared.kind == "done", prepared.said
        after = [kill_after, *[None] * (len(works) - 1)]
        return [apart(lambda work=work: work(folder), kill_after=at) for work, at in zip(works, after, strict=True)]
    finally:
        shutil.rmtree(folder)


def kill(job: Job, should: object, *, side: int | None = None, after: float | None = None) -> Kill:
    """Kill a job once, at one side of a call or after so many seconds, go on, and compare with what should be."""

    def disturbed(folder: Path) -> object:
        _Counted(side)
        return job.work(folder)

    def afterwards(folder: Path) -> object:
        job.again(folder)
        return job.result(folder), sorted(str(path.relative_to(folder)) for path in folder.rglob("*.part"))

    first, second = _in_folder(job, disturbed, afterwards, kill_after=after)
    moment = f"side {side}" if after is None else f"{after:.3f} s"
    if first.kind not in ("killed", "done"):
        return Kill(job.name, moment, f"before it was killed: {first.kind}: {first.said}")
    if second.kind != "done":
        return Kill(job.name, moment, f"afterwards: {second.kind}: {second.said}")
    assert isinstance(second.value, tuple)
    result, leftovers = second.value
    if leftovers:
        return Kill(job.name, moment, f"left behind: {', '.join(leftovers)}")
    return Kill(job.name, moment, "" if result == should else "another result than undisturbed")


Once = Callable[[str, type[Kill], Callable[[], Kill]], Kill]
"""Does a piece of work under its name, or knows what came of it."""


def campaign(count: int, seed: int, once: Once, light: bool = False) -> list[Kill]:
    """So many kills: a fifth at random moments, the others at sides of calls, each once as far as they go. light:
    without the jobs that export to ONNX.
    """
    jobs = [job for job in JOBS if not (light and job.exports)]
    chance, should = random.Random(seed), {job.name: undisturbed(job) for job in jobs}
    every = [(job, side) for job in jobs for side in range(should[job.name].sides)]
    kills = []
    for job, side in chance.sample(every, min(len(every), count - count // 5)):
        name, result = f"{job.name}, side {side}", should[job.name].result
        kills.append(once(name, Kill, lambda: kill(job, result, side=side)))  # noqa: B023
    while len(kills) < count:
        job, share = chance.choice(jobs), chance.random()
        name, usual = f"{job.name}, at {share} of it", should[job.name]
        kills.append(once(name, Kill, lambda: kill(job, usual.result, after=share * usual.seconds)))  # noqa: B023
    return kills
