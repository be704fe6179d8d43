"""The memory that one ONNX file takes in onnxruntime, seen by a process of its own.

What a process has loaded before, or another file has taken and given back, does not show in it. The child is this file
run as a script, without its folder on the path (``-P``), whose files are called as other modules are: it imports NumPy
and onnxruntime alone, and runs a trivial file first.
"""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

_RUNS = 3


def memory_of(
    path: str | os.PathLike[str], provider: tuple[str, Mapping[str, object]], feeds: Mapping[str, np.ndarray]
) -> tuple[int | None, int | None]:
    """(host, GPU) bytes: how far the peak of a process rises above what it held before the session, and what a GPU then
    holds more. None where that cannot be told. provider: a name and options, as onnxruntime takes it.
    """
    from onnx import TensorProto, helper

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "trivial", [x], [y])
    trivial = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "trivial.onnx").write_bytes(trivial.SerializeToString())
        np.savez(Path(folder, "feeds.npz"), *feeds.values())
        given = json.dumps([os.path.abspath(path), provider, list(feeds), folder])
        command = [sys.executable, "-P", __file__, given]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return None, None
    host, device = json.loads(done.stdout.splitlines()[-1])
    return host, device


def _measured(path: str, provider: Sequence[object], names: list[str], folder: str) -> tuple[int, int | None]:
    import onnxruntime

    if provider[0] != "CPUExecutionProvider" and hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()  # what torch's import does elsewhere

    def opened(file: str) -> Any:  # Any: an onnxruntime.InferenceSession, which has no types
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(file, options, providers=[tuple(provider)])
        if session.get_providers()[0] != provider[0]:
            sys.exit(1)  # the memory of another provider is not what was asked for
        return session

    small = opened(os.path.join(folder, "trivial.onnx"))
    small.run(None, {"x": np.zeros(1, np.float32)})
    arrays = np.load(os.path.join(folder, "feeds.npz"))
    feeds = {name: arrays[f"arr_{i}"] for i, name in enumerate(names)}
    before, on_gpu = _resident("VmRSS"), _on_gpu(small)
    session = opened(path)
    for _ in range(_RUNS):
        session.run(None, feeds)
    after = _on_gpu(session)
    device = None if on_gpu is None or after is None else max(0, after - on_gpu)
    return max(0, _resident("VmHWM") - before), device


def _resident(what: str) -> int:
    """Bytes of this process, now (VmRSS) or at most (VmHWM); getrusage would count the parent's too."""
    status = Path("/proc/self/status")
    if status.exists():
        match = re.search(rf"{what}:\s+(\d+) kB", status.read_text())
        assert match is not None
        return int(match[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes where there is no /proc


def _on_gpu(session: Any) -> int | None:  # Any: an onnxruntime.InferenceSession
    """Bytes in use on the first GPU, by anyone."""
    if session.get_providers()[0] == "CPUExecutionProvider":
        return None
    try:
        said = subprocess.run(
            ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"], capture_output=True, text=True
        )
        return int(said.stdout.splitlines()[0]) * 2**20
    except (OSError, ValueError, IndexError):
        return None


if __name__ == "__main__":
    print(json.dumps(_measured(*json.loads(sys.argv[1]))))
