"""The learning rate of every epoch to come, asked of a copy of the scheduler."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau


def planned_rates(optimizer: Optimizer, lr_scheduler: Any, epochs: int, steps: int = 1) -> tuple[float, ...]:
    """The learning rate of the first group now and at the start of the following epochs, ``epochs`` of them.

    lr_scheduler: one that is stepped so many times an epoch, or None for a constant rate. Empty where the rates depend
    on what is not known yet (ReduceLROnPlateau) or the scheduler is none of torch's kind. Nothing is changed.
    """
    now = float(optimizer.param_groups[0]["lr"])
    if lr_scheduler is None:
        return (now,) * epochs
    if isinstance(lr_scheduler, ReduceLROnPlateau) or not isinstance(lr_scheduler, LRScheduler):
        return ()
    dummy = _stand_in(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of steps without an optimizer's, and beyond a schedule's end
        twin = copy.deepcopy(lr_scheduler, {id(optimizer): dummy, id(lr_scheduler.optimizer): dummy})
        rates = []
        for _ in range(epochs):
            rates.append(float(dummy.param_groups[0]["lr"]))
            try:
                for _ in range(steps):
                    twin.step()
            except ValueError:  # OneCycleLR has an end
                break
    return tuple(rates)


def _stand_in(optimizer: Optimizer) -> Optimizer:
    """An optimizer with the same groups, each of one number."""
    dummy = SGD([torch.zeros(1)], lr=0.0)
    dummy.param_groups.clear()
    for group in optimizer.param_groups:
        settings = {key: copy.deepcopy(value) for key, value in group.items() if key not in ("params", "param_names")}
        dummy.param_groups.append({**settings, "params": [torch.zeros(1)]})
    return dummy
