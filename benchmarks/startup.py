"""How long the command takes to answer, as a process."""

from __future__ import annotations

import statistics
import subprocess
import sysconfig
from functools import partial
from pathlib import Path

from benchmarks.measuring import timed
from benchmarks.result import Column, Table

COLUMNS = (Column("command"), Column("median", "ms", ".0f"))


def startup(quick: bool) -> Table:
    command = [str(Path(sysconfig.get_path("scripts")) / "dynrank-fx"), "--help"]
    run = partial(subprocess.run, command, check=True, capture_output=True)
    run()  # the first one writes bytecode
    median = statistics.median(timed(run) for _ in range(3 if quick else 15))
    return Table(COLUMNS, (("dynrank-fx --help", 1e3 * median),))
