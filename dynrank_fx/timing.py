"""Measurements: two things in one run, in turn, and where the time of an ONNX file goes."""

from __future__ import annotations

import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_HEAVY = ("Conv", "ConvTranspose", "Gemm", "MatMul")


@dataclass(frozen=True)
class Pair:
    """Medians in seconds of two things run in turn, and the median of the ratios second / first of neighbours."""

    first: float
    second: float
    ratio: float


def interleaved(
    first: Callable[[], Any], second: Callable[[], Any], *, repeats: int = 30, warmup: int = 3, inner: int = 1
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
    ratios = [b / a for a, b in zip(*times, strict=True)]
    return Pair(statistics.median(times[0]), statistics.median(times[1]), statistics.median(ratios))


def _seconds(call: Callable[[], Any], inner: int) -> float:
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
    return f"{count} thread{'s' if count > 1 else ''}"


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def weight_times(path: Path, feed: Mapping[str, Any], *, repeats: int = 20) -> dict[str, float]:
    """Median microseconds that onnxruntime (CPU provider) spends on each weight of an ONNX file, by its own profile.

    By initializer name, for convolutions and matrix products; onnxruntime fuses what follows them (bias, batch norm,
    ReLU) into the same kernel. A weight whose kernel cannot be told is left out.
    """
    import onnx
    import onnxruntime

    owners = _kernel_names(onnx.load(path))
    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        for _ in range(repeats + 3):
            session.run(None, dict(feed))
        events = json.loads(Path(session.end_profiling()).read_text())
    times: dict[str, list[float]] = {}
    for event in events:
        name = event["name"].removesuffix("_kernel_time").removesuffix("_nchwc")
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time") and name in owners:
            times.setdefault(owners[name], []).append(event["dur"])
    return {weight: statistics.median(values[3:] or values) for weight, values in times.items()}


def _kernel_names(model: Any) -> dict[str, str]:
    """The weight behind each name that onnxruntime may give a kernel: of the node, or of an output it was fused up
    to.
    """
    weights = {initializer.name for initializer in model.graph.initializer}
    consumers: dict[str, list[Any]] = {}
    for node in model.graph.node:
        for name in node.input:
            consumers.setdefault(name, []).append(node)
    found: dict[str, tuple[int, str]] = {}
    for node in model.graph.node:
        weight = next((name for name in node.input[1:2] if name in weights), None)
        if node.op_type not in _HEAVY or weight is None:
            continue
        found[node.name] = (0, weight)
        names, distance = list(node.output), 0
        while names and distance < 5:
            for name in names:
                if distance < found.get(name, (99, ""))[0]:
                    found[name] = (distance, weight)
            after = [c for name in names for c in consumers.get(name, ()) if c.op_type not in _HEAVY]
            names, distance = [name for c in after for name in c.output], distance + 1
    return {name: weight for name, (_, weight) in found.items()}
