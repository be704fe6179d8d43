"""Measured times: of two things that run in turn, and the machine that they ran on."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Pair:
    """Times of two things that were run in turn.

    Attributes:
        first: The median of the first, in seconds.
        second: The median of the second, in seconds.
        ratio: The median of the ratios second / first of neighbouring runs.
        spread: How far the ratio is uncertain: over whole rounds, if there were several, or over all but the outer
            tenths of the runs; None where not known.
    """

    first: float
    second: float
    ratio: float
    spread: tuple[float, float] | None = None


def interleaved(
    first: Callable[[], object], second: Callable[[], object], *, repeats: int = 30, warmup: int = 3, inner: int = 1
) -> Pair:
    """Time both in turn, so that a slow moment of the machine hits both. inner: calls per measurement, of which the
    mean counts.
    """
    for _ in range(warmup):
        first()
        second()
    times: tuple[list[float], list[float]] = ([], [])
    for repeat in range(repeats):
        # The order alternates: who comes second finds a warmer cache.
        for index in (0, 1) if repeat % 2 else (1, 0):
            times[index].append(_seconds((first, second)[index], inner))
    ratios = sorted(b / a for a, b in zip(*times, strict=True))
    spread = ratios[len(ratios) // 10], ratios[-1 - len(ratios) // 10]
    return Pair(statistics.median(times[0]), statistics.median(times[1]), statistics.median(ratios), spread)


def _seconds(call: Callable[[], object], inner: int) -> float:
    _synchronize()
    started = time.perf_counter()
    for _ in range(inner):
        call()
    _synchronize()
    return (time.perf_counter() - started) / inner


def _synchronize() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def machine() -> str:
    """The machine and torch in one line, for a table."""
    threads = threads_said(torch.get_num_threads())
    return f"{device()}; {threads}; torch {torch.__version__}; Python {platform.python_version()}"


def device() -> str:
    """The GPU's name, or the processor's."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{processor()}, no GPU"


def threads_said(count: int) -> str:
    """A number of threads in words."""
    return f"{count} thread{'s' if count > 1 else ''}"


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
