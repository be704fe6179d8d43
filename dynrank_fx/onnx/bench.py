"""How fast an ONNX file runs, by the provider that really runs it, alone or in turn with another file."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..aliases import JsonObject
from ..errors import ExportError
from ..text import text_table
from ..timing import device, interleaved, threads_said
from .memory import memory_of
from .random_inputs import loaded, random_inputs, table_rows
from .session import Provider, Session, bound, runtime, session, threads


@dataclass(frozen=True)
class Timing:
    """One file at one batch size. Times in seconds; ratio: the median of neighbouring pairs, over the other file.

    memory, gpu_memory: bytes that a process of its own takes for the file, see ``memory_of``; None where unknown.
    """

    file: str
    provider: str
    batch: int
    median: float
    p90: float
    p99: float
    throughput: float
    memory: int | None
    gpu_memory: int | None
    ratio: float | None = None

    def to_json(self) -> JsonObject:
        return asdict(self)


def bench_onnx(
    path: str | os.PathLike[str],
    against: str | os.PathLike[str] | None = None,
    *,
    batch_sizes: Sequence[int] = (1, 8, 32),
    providers: Sequence[Provider] | None = None,
    repeats: int = 100,
    warmup: int = 10,
) -> list[Timing]:
    """Latencies on random inputs that lie where the provider wants them (IO binding), after a warm-up.

    against: another file of the same inputs, run in turn with the first. A file whose batch is fixed is run at that
    alone. Raises ExportError for a file that cannot be run, for a provider that does not come up, and for a CUDA graph
    (the provider's ``enable_cuda_graph``) of several batch sizes.
    """
    graphs = any(
        not isinstance(each, str) and str(each[1].get("enable_cuda_graph", 0)) != "0" for each in providers or ()
    )
    if graphs and len(batch_sizes) > 1:
        raise ExportError("a CUDA graph is of one batch size: give one alone")
    files = [Path(path), *([Path(against)] if against is not None else [])]
    opened = [session(file, providers) for file in files]
    sizes = [{spec.name: len(spec.shape) for spec in each.get_inputs()} for each in opened]
    if any(list(each.values()) != list(sizes[0].values()) for each in sizes):
        raise ExportError(
            f"{files[0]} takes inputs with these numbers of dimensions: {sizes[0]}, and {files[1]} {sizes[1]}: they "
            "are of two models"
        )
    rows = table_rows(loaded(files[0]))
    timings = []
    for batch in _batches(opened[0], batch_sizes):
        feeds = [random_inputs(each, batch, rows=rows) for each in opened]
        calls = [bound(each, given) for each, given in zip(opened, feeds, strict=True)]
        for call in calls * warmup:
            call()
        ratio = interleaved(calls[-1], calls[0], repeats=max(repeats // 2, 5), warmup=0).ratio if against else None
        times = [_times(call, repeats) for call in calls]
        for i, (file, each) in enumerate(zip(files, opened, strict=True)):
            ordered = sorted(times[i])
            p90, p99 = (ordered[min(len(ordered) - 1, int(share * len(ordered)))] for share in (0.9, 0.99))
            median = statistics.median(ordered)
            over = ratio if i == 0 else None
            provider = each.get_providers()[0]
            memory = memory_of(file, (provider, each.get_provider_options()[provider]), feeds[i])
            timings.append(Timing(str(file), provider, batch, median, p90, p99, batch / median, *memory, over))
    return timings


def table(timings: Sequence[Timing]) -> str:
    """The timings as text."""
    head = ("file", "provider", "batch", "median ms", "p90", "p99", "per second", "memory MB", "GPU MB", "ratio")
    rows = [
        (
            t.file,
            t.provider.removesuffix("ExecutionProvider"),
            str(t.batch),
            *(f"{1e3 * value:.3f}" for value in (t.median, t.p90, t.p99)),
            f"{t.throughput:,.0f}",
            _megabytes(t.memory) or "unknown",
            _megabytes(t.gpu_memory),
            "" if t.ratio is None else f"{t.ratio:.2f}",
        )
        for t in timings
    ]
    return text_table(head, rows, right=range(2, 10))


def _batches(opened: Session, wanted: Sequence[int]) -> list[int]:
    first = opened.get_inputs()[0].shape
    return [first[0]] if first and isinstance(first[0], int) else list(wanted)


def _times(call: Callable[[], None], repeats: int) -> list[float]:
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return seconds


def onnx_machine() -> str:
    """The machine and onnxruntime in one line."""
    count = threads()
    said = threads_said(count) if count else "its own number of threads"
    return f"{device()}; onnxruntime {runtime().__version__}, {said}; Python {platform.python_version()}"


def _megabytes(size: int | None) -> str:
    return "" if size is None else f"{size / 1e6:.0f}"
