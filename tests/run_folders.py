"""What a run of ``dynrank-fx train`` has written, to be compared with another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dynrank_fx.training import read_run


def checkpoint(folder: str) -> tuple[dict[str, bytes], Any]:
    """Tensors as bytes, and the rest without what was timed."""

    def untimed(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: untimed(v) for k, v in value.items() if not k.endswith(("seconds", "memory"))}
        return [untimed(v) for v in value] if isinstance(value, list) else value

    tensors, info = read_run(Path(folder))
    del info["run"], info["log"]  # other names, times and digests
    return {name: t.flatten().view(torch.uint8).numpy().tobytes() for name, t in tensors.items()}, untimed(info)
