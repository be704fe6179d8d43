"""Hooks on both sides of an optimizer's step, which come off together."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ..aliases import Args, Kwargs


class AroundSteps(abc.ABC):
    """What is done before and after each step of these optimizers; ``remove()``, or the end of a ``with`` block, takes
    it off.

    Args:
        optimizers: Whose steps.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._handles: list[RemovableHandle] = []
        for optimizer in optimizers:
            self._handles.append(optimizer.register_step_pre_hook(self._before))
            self._handles.append(optimizer.register_step_post_hook(self._after))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Leave the steps to the optimizer alone again."""
        for handle in self._handles:
            handle.remove()

    @abc.abstractmethod
    def _before(self, optimizer: Optimizer, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        """Before a step; what it gives takes the place of the step's own arguments."""

    @abc.abstractmethod
    def _after(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        """After a step."""


def if_stepped(optimizer: Optimizer, then: Tensor, otherwise: Tensor) -> Tensor:
    """One of two values: where gradients overflowed, a fused optimizer under a GradScaler makes no step, though its
    hooks run. No device is waited for.
    """
    overflow: Tensor | None = getattr(optimizer, "found_inf", None)
    return then if overflow is None else torch.where(overflow.bool(), otherwise, then)
