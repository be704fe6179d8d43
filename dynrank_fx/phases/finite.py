"""Whether a training is still sound: what is not finite must not become the checkpoint that one goes on from."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import DynrankWarning
from ..processes import own
from ..tracing import is_statistic


def infinite_buffers(net: nn.Module) -> frozenset[str]:
    """Those that are not finite before training, as masks may be, but the statistics of batch norms never."""
    named = net.named_buffers()
    return frozenset(name for name, buffer in named if not is_statistic(name) and not _is_finite(buffer))


def not_finite(net: nn.Module, optimizers: Iterable[Optimizer], *, but: frozenset[str] | None = None) -> str | None:
    """The first weight, buffer or state of an optimizer that is not finite in this process.

    but: buffers that were so before training; where that is not known, all but the statistics of batch norms.
    """
    but = infinite_buffers(net) if but is None else but
    names: dict[Tensor, str] = {parameter: name for name, parameter in net.named_parameters()}
    held: list[tuple[str, object]] = [(name, parameter) for parameter, name in names.items()]
    held += [(name, buffer) for name, buffer in net.named_buffers() if name not in but]
    held += [
        (f"the optimizer's {key} of {names.get(parameter, 'a parameter')}", value)
        for optimizer in optimizers
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
        if isinstance(value, Tensor)
    ]
    held += [("the learning rate", group.get("lr")) for each in optimizers for group in each.param_groups]
    return next((name for name, value in held if not _is_finite(value)), None)


def _is_finite(value: object) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    if not isinstance(value, Tensor) or value.is_quantized or not (value.is_floating_point() or value.is_complex()):
        return True
    mine = own(value)
    return bool(torch.isfinite(mine.float() if mine.itemsize == 1 else mine).all())  # of 8 bits it knows not all kinds


def warn_of(what: str | None) -> None:
    """Warn of what is not finite, if anything is, where it is about to be saved."""
    if what is not None:
        warnings.warn(
            f"{what} is not finite, as in a training that has diverged: what is saved now is nothing to go on from",
            DynrankWarning,
            stacklevel=3,
        )
