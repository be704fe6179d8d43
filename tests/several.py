"""Work done by several processes together, as the tests of training in several processes need it.

Each test starts its own, with gloo over a file, so that no port is asked for. A process that fails, or takes too long,
ends the others, and none is left behind.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import multiprocessing.connection
import os
import pickle
import queue
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

SECONDS = 120  # for all of a test's work
_STARTING = multiprocessing.get_context("forkserver")
_PRELOADED = ["dynrank_fx", "dynrank_fx.compression", "dynrank_fx.rewrite", "dynrank_fx.training"]
_STARTING.set_forkserver_preload([*_PRELOADED, "pytest", "torch._dynamo", "torch.distributed.checkpoint"])


def in_processes(
    work: Callable[..., Any], *args: object, count: int = 2, seconds: float = SECONDS, backend: str = "gloo"
) -> list[Any]:
    """What ``work(rank, *args)`` returns in each of so many processes, by rank. It is a function of a module's, and
    what it takes and returns can be pickled. The group is there when it is called; of NCCL, each has a GPU.

    Raises AssertionError with the traceback of the process that failed first.
    """
    with _begun(work, args, count, seconds, backend) as (started, results):
        return _collected(results, started, seconds)


@contextmanager
def _begun(
    work: Callable[..., Any], args: Any, count: int, seconds: float, backend: str = "gloo"
) -> Iterator[tuple[list[Any], Any]]:
    """The processes, with the queue of their results; none is left afterwards."""
    results = _STARTING.Queue()
    with TemporaryDirectory() as folder:
        started = [
            _STARTING.Process(
                target=_one, args=(work, rank, count, folder, results, args, seconds, backend), daemon=True
            )
            for rank in range(count)
        ]
        for process in started:
            process.start()
        try:
            yield started, results
        finally:
            for process in started:
                process.join(timeout=10)
                if process.is_alive():
                    process.kill()
                    process.join()


def until_one_ends(
    work: Callable[..., Any], *args: object, count: int = 2, seconds: float = SECONDS, kill: Callable[[list[int]], None]
) -> list[int]:
    """Run ``work`` as ``in_processes`` does, where processes are killed: by themselves, or by ``kill``, which is given
    their ids. When one has ended, the others have a little time to do so. Returns the exit codes.
    """
    with _begun(work, args, count, seconds) as (started, _):
        kill([process.pid for process in started if process.pid is not None])
        multiprocessing.connection.wait([process.sentinel for process in started], timeout=seconds)
    return [process.exitcode or 0 for process in started]


def as_launched(rank: int, count: int = 2) -> None:
    """What torchrun leaves in the environment of a process, for trainers, which look there for who they are."""
    os.environ |= {
        **{name: str(rank) for name in ("RANK", "LOCAL_RANK", "GROUP_RANK")},
        **{name: str(count) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")},
        **{"MASTER_ADDR": "localhost", "MASTER_PORT": "0", "TORCHELASTIC_RUN_ID": "tests"},
    }


def _collected(results: Any, started: list[Any], seconds: float) -> list[Any]:
    found: dict[int, Any] = {}
    end = time.monotonic() + seconds
    while len(found) < len(started):
        try:
            rank, failure, value = results.get(timeout=0.5)
        except queue.Empty:
            gone = [i for i, p in enumerate(started) if p.exitcode not in (None, 0) and i not in found]
            assert not gone, f"process {gone[0]} ended with {started[gone[0]].exitcode}"
            assert time.monotonic() < end, f"{len(started) - len(found)} processes were not done in {seconds} s"
            continue
        assert failure is None, f"process {rank}:\n{failure}"
        found[rank] = pickle.loads(value)
    return [found[rank] for rank in range(len(started))]


def _one(
    work: Callable[..., Any],
    rank: int,
    count: int,
    folder: str,
    results: Any,
    args: Any,
    seconds: float,
    backend: str,
) -> None:
    os.setpgid(0, 0)
    faulthandler.dump_traceback_later(seconds, exit=True)  # where it hangs
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(Path(folder) / "store"), count)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    torch.distributed.init_process_group(
        backend, store=store, rank=rank, world_size=count, timeout=timedelta(seconds=seconds / 2)
    )
    try:
        # Pickled here: a queue would send a tensor as memory of this process, which is about to end.
        results.put((rank, None, pickle.dumps(work(rank, *args))))
    except BaseException:
        results.put((rank, traceback.format_exc(), None))
    finally:
        results.close()
        results.join_thread()
        faulthandler.cancel_dump_traceback_later()
        # Not destroy_process_group, which waits for those that are gone; nor Python's own end, which waits for threads.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os._exit(0)
