"""The clock of a run: optimizer steps, divided into ticks, at each of which the schedule decides."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ..checks import check_epochs, check_length, is_whole
from ..errors import ScheduleError, TransitionError
from ..processes import Processes, started
from ..schedules import Schedule

TICKS = 20
"""Of a run that is counted in steps, or has one epoch only: in so many a schedule has room to act."""

FEW = 5
"""Epochs that are so few are divided into as many ticks, for a schedule that does not count them."""


@dataclass(frozen=True)
class Clock:
    """How a run is divided into ticks.

    Attributes:
        ticks: How many ticks the run has.
        every: Optimizer steps from one tick to the next, the last tick being shorter where they do not divide the run;
            None where nobody said.
        by_epochs: Whether a tick is an epoch.
        per_epoch: Optimizer steps of an epoch; None where the run has none, or nobody said.
        steps: Optimizer steps of the run; None where nobody said.
        parts: The ticks of each epoch, where epochs are divided; they differ by a step where they do not divide it.
    """

    ticks: int
    every: int | None
    by_epochs: bool
    per_epoch: int | None = None
    steps: int | None = None
    parts: int = 1

    @property
    def unit(self) -> str:
        """What a tick is called: ``epoch`` or ``tick``."""
        return "epoch" if self.by_epochs else "tick"

    def start(self, tick: int) -> int:
        """The optimizer steps that are done when a tick begins; 0 where nobody said."""
        if self.parts > 1 and self.per_epoch is not None:
            epoch, part = divmod(tick, self.parts)
            return epoch * self.per_epoch + part * self.per_epoch // self.parts
        steps = tick * (self.every or 0)
        return steps if self.steps is None else min(steps, self.steps)

    def begins_epoch(self, tick: int) -> bool:
        """Whether this tick is the first of an epoch, of a run that goes by them."""
        return self.by_epochs or (self.parts > 1 and tick % self.parts == 0)

    def ends_epoch(self, tick: int) -> bool:
        """Whether an epoch ends with this tick; the last one ends with the run."""
        return self.begins_epoch(tick + 1) or tick + 1 == self.ticks

    def divided(self, schedule: Schedule) -> Clock:
        """This clock, with few epochs divided into ticks where the schedule does not count them (``within_epochs``)."""
        few = self.by_epochs and 1 < self.ticks <= FEW and self.per_epoch is not None
        if not few or not getattr(schedule, "within_epochs", False):
            return self
        assert self.per_epoch is not None
        return self.in_parts(min(self.per_epoch, math.ceil(TICKS / self.ticks)))

    def in_parts(self, parts: int) -> Clock:
        """This clock with each epoch divided into so many ticks."""
        whole = self.whole()
        assert whole.per_epoch is not None
        every = math.ceil(whole.per_epoch / parts)
        return replace(whole, ticks=whole.ticks * parts, every=every, by_epochs=parts == 1, parts=parts)

    def going_on(self, begun: Mapping[int, int]) -> Clock:
        """This clock with the ticks of an earlier run, which goes on here with another length; this one where they are
        the same, and where they do not fit. begun: The steps that were done when each of its ticks began.
        """

        def fits(clock: Clock) -> bool:
            return all(clock.start(tick) == step for tick, step in begun.items())

        if fits(self) or self.steps is None:
            return self
        last, steps = max(begun.items())
        every = max(1, steps // max(1, last))
        in_steps = replace(self, ticks=math.ceil(self.steps / every), every=every, by_epochs=False, parts=1)
        whole = self.by_epochs or self.parts > 1
        divided = [self.in_parts(parts) for parts in range(2, TICKS + 1)] if whole and self.per_epoch else []
        return next(filter(fits, [*divided, in_steps]), self)

    def whole(self) -> Clock:
        """This clock with its epochs undivided again."""
        if self.parts == 1:
            return self
        return replace(self, ticks=self.ticks // self.parts, every=self.per_epoch, by_epochs=True, parts=1)

    def scheduler_steps(self, tick: int, every_step: bool) -> int | None:
        """How often a learning-rate scheduler has been stepped when a tick begins; None where that is not known."""
        if every_step:
            return tick if self.every is None else self.start(tick)
        if self.by_epochs:
            return tick
        return None if self.per_epoch is None else self.start(tick) // self.per_epoch


def clock_of(epochs: int | None = None, steps: int | None = None, every: int | None = None) -> Clock:
    """The clock of a run.

    epochs: of the run. steps: of each epoch, or of the run where no epochs are given. every: steps of a tick; by
    default a tick is an epoch, and a twentieth of a run that has one epoch or none. Raises ScheduleError for numbers
    that cannot be, and where nothing says how long the run is.
    """
    if epochs is not None:
        check_epochs(epochs)
    if steps is not None and not is_whole(steps, 1):
        what = "a run" if epochs is None else "an epoch"
        raise ScheduleError(f"{what} cannot have {steps!r} steps: give a whole number of 1 or more, or leave it out")
    if every is not None and not is_whole(every, 1):
        raise ScheduleError(f"a tick cannot have {every!r} steps: give a whole number of 1 or more, or leave it out")
    if epochs is not None and every is None and (epochs > 1 or steps is None):
        return Clock(epochs, steps, True, steps, steps and epochs * steps)
    if steps is None:
        raise ScheduleError("a schedule of phases needs an end: give the steps of the run, or its epochs")
    total = steps if epochs is None else epochs * steps
    if every is not None and every > total:
        raise ScheduleError(f"ticks of {every} steps are longer than the run of {total}: give fewer to each")
    every = every or -(-total // TICKS)  # of whole numbers, which may be larger than a float
    check_length(-(-total // every), "tick")
    return Clock(-(-total // every), every, False, None if epochs is None else steps, total)


class StepHook:
    """Calls a function after every step of the optimizers; of several, when the last of them has made it.

    Made after whatever else hooks into them, so that it is called when a step is done with.
    """

    def __init__(self, optimizers: Sequence[Optimizer], then: Callable[[], None]) -> None:
        self._then = then
        self._done = {id(optimizer): 0 for optimizer in optimizers}
        self._handles: list[RemovableHandle] = [each.register_step_post_hook(self._after) for each in optimizers]

    def _after(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        if not is_nested(optimizer):
            self.count(optimizer)

    def count(self, optimizer: Optimizer) -> None:
        """A step of this optimizer is done with."""
        before = min(self._done.values())
        self._done[id(optimizer)] += 1
        if min(self._done.values()) > before:
            self._then()

    def remove(self) -> None:
        """Take the hooks off the optimizers."""
        for handle in self._handles:
            handle.remove()


class SkipHook:
    """Calls a function with the optimizer whenever a GradScaler is told to step one of these and does not.

    A scaler has no hooks: its own ``step`` is called from one in its place.
    """

    def __init__(
        self, scaler: torch.amp.GradScaler, optimizers: Sequence[Optimizer], then: Callable[[Optimizer], None]
    ) -> None:
        self._optimizers = optimizers
        self._step: Callable[..., float | None] = scaler.step
        self._then: Callable[[Optimizer], None] | None = then
        scaler.step = self._watched  # type: ignore[method-assign]

    def _watched(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> float | None:  # Any: the optimizer's own
        if self._then is None or all(optimizer is not each for each in self._optimizers):
            return self._step(optimizer, *args, **kwargs)
        made: list[Optimizer] = []
        handle = optimizer.register_step_pre_hook(lambda *_: made.append(optimizer))
        try:
            result = self._step(optimizer, *args, **kwargs)
        finally:
            handle.remove()
        if not made:
            self._then(optimizer)
        return result

    def remove(self) -> None:
        """Call it no more. The scaler's step stays in place, since another may have been put around it."""
        self._then = None


def refuse_second(optimizer: Optimizer) -> None:
    """Raises TransitionError for an optimizer that has Phases already."""
    for hook in optimizer._optimizer_step_post_hooks.values():
        if isinstance(getattr(hook, "__self__", None), StepHook):
            raise TransitionError(
                "this optimizer has Phases already, and two would undo each other's switches: call remove() of the "
                "first, or make net and optimizer anew"
            )


def is_nested(optimizer: Optimizer) -> bool:
    """Whether the hook that asks runs for a step within a step: where a subclass calls its base's step, torch runs the
    hooks for both. The stack tells, whatever became of earlier steps.
    """
    frame, steps = sys._getframe(1), 0
    while frame is not None:
        steps += frame.f_code.co_name == "wrapper" and frame.f_locals.get("self") is optimizer  # of torch, around step
        frame = frame.f_back  # type: ignore[assignment]
    return steps > 1


def refuse_unwrapped(processes: Processes) -> None:
    """Raise TransitionError where several processes run, and none is known to train the same net as this one.

    processes: those that train the net.
    """
    count = started().count
    if count > 1 and processes.count == 1:
        raise TransitionError(
            f"{count} processes run, and the net is wrapped in nothing that averages their gradients, so that each "
            "would train a model of its own: wrap what transform made in DistributedDataParallel and give that, or "
            "shard it by fully_shard"
        )
