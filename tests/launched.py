"""A sample as a script that something starts in several processes: torchrun, accelerate, or Lightning, which starts it
again by itself. The script is this file, since torchvision has to find its ops before the sample imports a trainer.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from importlib import import_module
from pathlib import Path

TESTS = Path(__file__).parent
SAMPLES = TESTS.parent / "samples"
STARTERS = {
    "torchrun": ("torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
    "accelerate": ("accelerate.commands.launch", "--cpu", "--num_processes", "2", "--main_process_port", "0"),
}


def launched(starter: str | None, sample: str, *args: str, seconds: float = 480) -> str:
    """What a sample prints, started by one of these, or by itself. No process is left when this returns.

    Raises AssertionError where it fails, or takes too long.
    """
    command = [sys.executable, *(("-m", *STARTERS[starter]) if starter else ()), __file__, *args]
    with subprocess.Popen(
        command,
        env=os.environ | {"SAMPLE": sample, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as running:
        try:
            said, _ = running.communicate(timeout=seconds)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(running.pid, signal.SIGKILL)
    assert running.returncode == 0, said[-4000:]
    return said


if __name__ == "__main__":
    sys.path[:0] = [str(TESTS / "zoo"), str(SAMPLES)]
    import schemas  # noqa: F401

    import_module(os.environ["SAMPLE"]).main(*map(int, sys.argv[1:]))
