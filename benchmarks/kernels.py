"""What each weight of an ONNX file takes of the time of the whole, by onnxruntime's own profile."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import onnxruntime

HEAVY = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def weight_times(path: Path, feed: Mapping[str, Any], *, repeats: int = 20) -> dict[str, float]:
    """Median microseconds that onnxruntime (CPU provider) spends on each weight of an ONNX file, by its own profile.

    By initializer name, for convolutions and matrix products; onnxruntime fuses what follows them (bias, batch norm,
    ReLU) into the same kernel. A weight whose kernel cannot be told is left out.
    """
    owners = kernel_names(onnx.load(path))
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
        name = event["name"].removeprefix("fused ").removesuffix("_kernel_time").removesuffix("_nchwc")
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time") and name in owners:
            times.setdefault(owners[name], []).append(event["dur"])
    return {weight: statistics.median(values[3:] or values) for weight, values in times.items()}


def kernel_names(model: Any) -> dict[str, str]:
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
        if node.op_type not in HEAVY or weight is None:
            continue
        found[node.name] = (0, weight)
        names, distance = list(node.output), 0
        while names and distance < 5:
            for name in names:
                if distance < found.get(name, (99, ""))[0]:
                    found[name] = (distance, weight)
            after = [c for name in names for c in consumers.get(name, ()) if c.op_type not in HEAVY]
            names, distance = [name for c in after for name in c.output], distance + 1
    return {name: weight for name, (_, weight) in found.items()}
