"""Schedules: pure functions of a TrainState to a Phase, as frozen values that can be printed, compared and joined.

The three-part shape (low-rank, full-rank around the first learning-rate decay, low-rank again) is that of
arXiv 2508.08625. Its own last part is ADAPTOR, whose result is of full rank; LOW trains the truncated factors instead,
so that what is exported is small.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..errors import ScheduleError
from ..phase import Phase
from .state import Schedule, Setting, TrainState


@dataclass(frozen=True)
class Always:
    """The same phase in every epoch."""

    phase: Phase

    def __call__(self, state: TrainState) -> Phase:
        return self.phase


@dataclass(frozen=True)
class Interleave:
    """``low`` epochs LOW, then ``full`` epochs FULL, and again."""

    low: int
    full: int

    def __post_init__(self) -> None:
        if self.low < 0 or self.full < 0 or self.low + self.full == 0:
            raise ScheduleError(
                f"interleave(low={self.low}, full={self.full}) has no epochs to alternate: "
                "give both as 0 or more, and one of them as 1 or more"
            )

    def __call__(self, state: TrainState) -> Phase:
        return Phase.LOW if state.epoch % (self.low + self.full) < self.low else Phase.FULL


@dataclass(frozen=True)
class FullBetween:
    """FULL for ``inflate <= epoch < deflate``, LOW before, and ``last`` after."""

    inflate: int
    deflate: int
    last: Phase = Phase.LOW

    def __post_init__(self) -> None:
        if not 0 <= self.inflate < self.deflate:
            raise ScheduleError(
                f"FULL from epoch {self.inflate} to before epoch {self.deflate} is no FULL epoch; "
                "give inflate as 0 or more, and a later deflate"
            )

    def __call__(self, state: TrainState) -> Phase:
        if state.epoch >= self.deflate:
            return self.last
        return Phase.FULL if state.epoch >= self.inflate else Phase.LOW


@dataclass(frozen=True)
class Join:
    """``schedules[i]`` rules from ``boundaries[i-1]`` on, seeing epochs counted from there."""

    schedules: tuple[Schedule, ...]
    boundaries: tuple[int, ...]

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in zip((0, *self.boundaries), self.boundaries, strict=False))
        if len(self.schedules) != len(self.boundaries) + 1 or not rising:
            raise ScheduleError(
                f"join needs a boundary between each two schedules, rising from epoch 1 on; "
                f"it has {len(self.schedules)} schedules and the boundaries {self.boundaries}"
            )

    def __call__(self, state: TrainState) -> Setting:
        part = sum(state.epoch >= boundary for boundary in self.boundaries)
        start = self.boundaries[part - 1] if part else 0
        stop = self.boundaries[part] if part < len(self.boundaries) else state.epochs
        length = None if stop is None else stop - start
        local = replace(state, epoch=state.epoch - start, epochs=length, lrs=state.lrs[start:stop])
        return self.schedules[part](local)


def always(phase: Phase) -> Always:
    """The same phase in every epoch: ``always(Phase.FULL)`` is dense training. Raises ScheduleError for no phase."""
    if phase not in list(Phase):
        raise ScheduleError(f"{phase!r} is no phase; give one of {', '.join(p.name for p in Phase)}")
    return Always(Phase(phase))


def interleave(*, low: int, full: int) -> Interleave:
    """``low`` epochs LOW, then ``full`` epochs FULL, and so on. Raises ScheduleError if there is nothing to
    alternate.
    """
    return Interleave(low, full)


def aligned(epochs: int, lr_milestones: Sequence[int], last: Phase = Phase.LOW) -> FullBetween:
    """The paper's placement in general form: FULL from 0.4·T to the first decay + 0.1·T (arXiv 2508.08625).

    epochs: T, the length of the run. lr_milestones: the epochs at which the learning rate falls. last: LOW trains the
    truncated factors to the end, ADAPTOR a branch beside the frozen weight, as the paper does.
    Raises ScheduleError where that leaves no FULL epoch, or where there is no decay to align with.
    """
    if not lr_milestones:
        raise ScheduleError(
            "aligned needs the epochs of the learning-rate decays; give at least one, or use interleave"
        )
    inflate, deflate = round(0.4 * epochs), min(epochs, round(min(lr_milestones) + 0.1 * epochs))
    if not 0 <= inflate < deflate:
        raise ScheduleError(
            f"aligned(epochs={epochs}, lr_milestones={tuple(lr_milestones)}) leaves no FULL epoch: the first decay "
            f"plus a tenth of the run is epoch {deflate}, before epoch {inflate}; use join or interleave for so "
            f"early a decay"
        )
    return FullBetween(inflate, deflate, last)


def join(schedules: Sequence[Schedule], boundaries: Sequence[int]) -> Join:
    """One schedule after the other, each counting epochs from its own start; boundaries are absolute epochs."""
    return Join(tuple(schedules), tuple(boundaries))


def warm_up(full: int) -> FullBetween:
    """``full`` epochs FULL, then LOW to the end (as in arXiv 2103.03936). Raises ScheduleError for less than one."""
    return FullBetween(0, full)


def paper_cifar10(last: Phase = Phase.ADAPTOR) -> FullBetween:
    """ResNet-20 on CIFAR-10, 150 epochs: FULL in epochs 55 to 119, then ADAPTOR (arXiv 2508.08625).

    last: LOW trains the truncated factors instead, at less cost, and leaves a small model.
    """
    return FullBetween(55, 120, last)


def paper_cifar100(last: Phase = Phase.ADAPTOR) -> FullBetween:
    """WRN-28-10 on CIFAR-100, 200 epochs: FULL in epochs 80 to 169, then ADAPTOR (arXiv 2508.08625). last: as above."""
    return FullBetween(80, 170, last)
