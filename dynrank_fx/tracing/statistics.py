"""Running statistics of batch norms, which hide what is wrong with them: an infinite variance gives finite outputs."""

from __future__ import annotations

import torch
from torch import nn

_NAMES = ("running_mean", "running_var")


def is_statistic(name: str) -> bool:
    """Whether a buffer of this name is one, of a module or of a graph that torch.export made."""
    return name.endswith(_NAMES)


def infinite_statistic(module: nn.Module) -> str | None:
    """The name of the first that is not finite."""
    named = [(name, buffer) for name, buffer in module.named_buffers() if is_statistic(name)]
    return next((name for name, buffer in named if not buffer.is_meta and not torch.isfinite(buffer).all()), None)
