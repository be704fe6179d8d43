"""Whether a training is still sound: what is not finite must not become the checkpoint that one goes on from."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..processes import own
from ..tracing import is_statistic


def infinite_buffers(net: nn.Module) -> frozenset[str]:
    """Those that are not finite before training, as masks may be, but the statistics of batch norms never."""
    named = net.named_buffers()
    return frozenset(name for name, buffer in named if not is_statistic(name) and not torch.isfinite(buffer).all())


def not_finite(net: nn.Module, optimizers: Iterable[Optimizer], *, but: frozenset[str]) -> str | None:
    """The first weight, buffer or state of an optimizer that is not finite in this process, but for these buffers."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in net.named_parameters()}
    held: list[tuple[str, object]] = [(name, parameter) for parameter, name in names.items()]
    held += [(name, buffer) for name, buffer in net.named_buffers() if name not in but]
    held += [
        (f"the optimizer's {key} of {names.get(parameter, 'a parameter')}", value)
        for optimizer in optimizers
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
    ]
    return next((name for name, t in held if isinstance(t, Tensor) and not torch.isfinite(own(t)).all()), None)
