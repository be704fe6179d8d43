"""Several processes, as torchrun starts them: who this one is among them, their group, and what each is to say.

torchrun tells each process by its environment. What a command of one process would print, the first prints. An error
is told once, by whichever process met it.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dynrank_fx.errors import DynrankError

from .streams import echo

if TYPE_CHECKING:
    from dynrank_fx.processes import Processes

_TOLD = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_TOLD_THERE = re.compile(r" failed in process \d+ of \d+, and nothing was done in any: ")
_GONE = ("gloo/transport", "Connection closed by peer", "Connection reset by peer", "NCCL", "TCPStore")


class OfAnotherError(DynrankError):
    """What failed in another process, which tells it."""


@dataclass(frozen=True)
class Launched:
    """What torchrun says of this process.

    local: its number on this machine, of ``locally``. restarts: how often all were started anew. job: what tells this
    start of torchrun, restarts among it, from others. parent: the number of torchrun's own process.
    """

    rank: int
    count: int
    local: int
    locally: int
    restarts: int
    job: str
    parent: int

    @property
    def name(self) -> str:
        """For messages."""
        return f"process {self.rank} of {self.count}"


def launched() -> Launched | None:
    """What torchrun says of this process; None where it did not start it."""
    if any(name not in os.environ for name in _TOLD):
        return None
    rank, count, local, locally = (int(os.environ[name]) for name in _TOLD[:4])
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    return Launched(rank, count, local, locally, restarts, _job(), os.getppid())


def _job() -> str:
    """Of several machines, only the name that was given to all; of one, the torchrun process too."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    if int(os.environ.get("GROUP_WORLD_SIZE", 1)) > 1:
        return name
    parent = os.getppid()
    with suppress(OSError, IndexError):  # numbers of processes come again, with another time of their start
        started = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]
        return f"{name} {socket.gethostname()} {parent} {started}"
    return f"{name} {socket.gethostname()} {parent}"


def is_first() -> bool:
    """Whether this process prints: one alone, or the first of several."""
    return os.environ.get("RANK", "0") == "0" or launched() is None


def say(text: str) -> None:
    """Tell the user how it goes, once."""
    if is_first():
        echo(text, err=True)


def wish_to_stop(stopped: list[int], launch: Launched | None) -> int:
    """The signal that this process is to stop by: the first that it was sent, or one as of a closed terminal where
    torchrun has gone and nobody looks after it; 0 for none.
    """
    if stopped:
        return stopped[0]
    return int(signal.SIGHUP) if launch is not None and os.getppid() != launch.parent else 0


def refuse_several(command: str, but: tuple[str, ...]) -> None:
    """Raises UsageError where several processes run a command that is of one; all are, but for these."""
    launch = launched()
    if launch is not None and launch.count > 1 and command not in but:
        raise click.UsageError(
            f"torchrun started {launch.count} processes, and {command} is the work of one: start it as "
            f"`dynrank-fx {command} ...`"
        )


def device_of(given: str | None, launch: Launched | None) -> str:
    """The device of this process: of several, its own GPU, or the CPU. Raises UsageError for what cannot be shared."""
    if launch is None:
        return "cpu" if given is None else given
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if given is None:
        given = "cuda" if gpus >= launch.locally else "cpu"
    kind, _, number = given.partition(":")
    if number and launch.count > 1:
        raise click.UsageError(
            f"--device {given} is one device, and torchrun gives each process its own: say --device {kind}, or leave "
            "it out"
        )
    if kind != "cuda" or number:
        return given
    if gpus < launch.locally:
        raise click.UsageError(
            f"torchrun started {launch.locally} processes here, and this machine has {gpus} GPUs: start as many, "
            "--nproc-per-node gpu, or say --device cpu"
        )
    torch.cuda.set_device(launch.local)  # NCCL sends from there
    return f"cuda:{launch.local}"


@contextmanager
def together(launch: Launched | None) -> Iterator[Processes]:
    """The group of the processes, from here to the end."""
    from dynrank_fx.processes import ALONE, started

    if launch is None:
        yield ALONE
        return
    import torch
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    # torchrun keeps its store through restarts, in which the addresses of processes that have gone would be found.
    store, rank, count = next(rendezvous("env://"))
    store = PrefixStore(f"dynrank {launch.restarts}", store)
    # The part of the CPU sends what is no matter of the GPUs, so that no step waits for it.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=count)
    yield started()
    dist.destroy_process_group()  # not after an error: it would wait for those that are gone


def is_told_here(sentence: str) -> bool:
    """Whether an error is for this process to print: of several that met the same one, one is to, the first of them
    rather than others.
    """
    launch = launched()
    if launch is None or launch.count == 1:
        return True
    import torch.distributed as dist

    if not dist.is_initialized():
        return launch.rank == 0  # what is wrong before they meet is wrong in all
    if launch.rank > 0:
        time.sleep(0.5)
    try:
        # By this store they met, and it is there as long as torchrun is.
        told: int = dist.distributed_c10d._get_default_store().add(f"told {sentence}", 1)
    except (RuntimeError, ValueError):
        return True
    return told == 1


def of_another(error: BaseException) -> OfAnotherError | None:
    """The error as one of another process, which ended in the midst of what they did together; None for any other."""
    launch = launched()
    if launch is None or launch.count == 1 or "torch" not in sys.modules:
        return None
    import torch.distributed as dist

    if isinstance(error, DynrankError) and _TOLD_THERE.search(str(error)):
        return OfAnotherError(str(error))
    cause: BaseException | None = error
    while cause is not None:
        told = isinstance(cause, RuntimeError) and any(sign in str(cause) for sign in _GONE)
        if told or isinstance(cause, dist.DistError):
            return OfAnotherError("another process has ended, and this one with it")
        cause = cause.__cause__ or cause.__context__
    return None
