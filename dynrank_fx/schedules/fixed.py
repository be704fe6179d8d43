"""Schedules: pure functions of a TrainState to a Phase, as frozen values that can be printed, compared and joined.

The three-part shape (low-rank, full-rank around the first learning-rate decay, low-rank again) is that of
arXiv 2508.08625. Its own last part is ADAPTOR, whose result is of full rank; LOW trains the truncated factors instead,
so that what is exported is small.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..checks import check_epochs, check_schedule, is_list, is_whole
from ..errors import ScheduleError
from ..phase import Phase
from .state import Schedule, Setting, TrainState


@dataclass(frozen=True)
class Always:
    """The same phase in every epoch.

    Attributes:
        phase: That phase.
    """

    phase: Phase

    def __call__(self, state: TrainState) -> Phase:
        """The phase of the epoch that begins.

        Args:
            state: Where the run stands; only its epoch is read.

        Returns:
            The phase for all sites.
        """
        return self.phase


@dataclass(frozen=True)
class Interleave:
    """``low`` epochs LOW, then ``full`` epochs FULL, and again.

    Attributes:
        low: Epochs of LOW in a row.
        full: Epochs of FULL in a row.

    Raises:
        ScheduleError: For a negative number, or where both are 0.
    """

    low: int
    full: int

    def __post_init__(self) -> None:
        if not (is_whole(self.low) and is_whole(self.full) and self.low + self.full > 0):
            raise ScheduleError(
                f"interleave(low={self.low!r}, full={self.full!r}) has no epochs to alternate: "
                "give both as whole numbers, 0 or more, and one of them as 1 or more"
            )

    def __call__(self, state: TrainState) -> Phase:
        """The phase of the epoch that begins.

        Args:
            state: Where the run stands; only its epoch is read.

        Returns:
            LOW or FULL, for all sites.
        """
        return Phase.LOW if state.epoch % (self.low + self.full) < self.low else Phase.FULL


@dataclass(frozen=True)
class FullBetween:
    """FULL for ``inflate <= epoch < deflate``, LOW before, and ``last`` after.

    Attributes:
        inflate: The first epoch of FULL, counted from 0.
        deflate: The first epoch after FULL.
        last: The phase from ``deflate`` on.

    Raises:
        ScheduleError: Where that leaves no FULL epoch, and for what is no phase.
    """

    inflate: int
    deflate: int
    last: Phase = Phase.LOW

    def __post_init__(self) -> None:
        if not (is_whole(self.inflate) and is_whole(self.deflate, self.inflate + 1)):
            raise ScheduleError(
                f"FULL from epoch {self.inflate!r} to before epoch {self.deflate!r} is no FULL epoch; "
                "give inflate as a whole number, 0 or more, and a later deflate"
            )
        _checked_phase(self.last)

    def __call__(self, state: TrainState) -> Phase:
        """The phase of the epoch that begins.

        Args:
            state: Where the run stands; only its epoch is read.

        Returns:
            LOW, FULL or ``last``, for all sites.
        """
        if state.epoch >= self.deflate:
            return self.last
        return Phase.FULL if state.epoch >= self.inflate else Phase.LOW


@dataclass(frozen=True)
class Join:
    """Schedules one after the other, each seeing epochs counted from its own start.

    ``schedules[i]`` rules from ``boundaries[i - 1]`` on.

    Attributes:
        schedules: The schedules in their order.
        boundaries: The epochs at which the next one takes over, one fewer than schedules, rising from 1 on.

    Raises:
        ScheduleError: Where the boundaries do not rise, or there are too many or too few of them.
    """

    schedules: tuple[Schedule, ...]
    boundaries: tuple[int, ...]

    def __post_init__(self) -> None:
        for schedule in self.schedules:
            check_schedule(schedule)
        rising = all(map(is_whole, self.boundaries)) and all(
            a < b for a, b in zip((0, *self.boundaries), self.boundaries, strict=False)
        )
        if len(self.schedules) != len(self.boundaries) + 1 or not rising:
            raise ScheduleError(
                f"join needs a boundary between each two schedules, rising from epoch 1 on; "
                f"it has {len(self.schedules)} schedules and the boundaries {self.boundaries}"
            )

    def __call__(self, state: TrainState) -> Setting:
        """What the schedule whose turn it is says.

        Args:
            state: Where the run stands; the schedule is shown its own part of it, beginning at epoch 0.

        Returns:
            The setting that the schedule gives.
        """
        part = sum(state.epoch >= boundary for boundary in self.boundaries)
        start = self.boundaries[part - 1] if part else 0
        stop = self.boundaries[part] if part < len(self.boundaries) else state.epochs
        length = None if stop is None else stop - start
        local = replace(state, epoch=state.epoch - start, epochs=length, lrs=state.lrs[start:stop])
        return self.schedules[part](local)


def always(phase: Phase) -> Always:
    """The same phase in every epoch: ``always(Phase.FULL)`` is dense training.

    Args:
        phase: The phase for all sites.

    Returns:
        The schedule.

    Raises:
        ScheduleError: For what is no phase.
    """
    return Always(_checked_phase(phase))


def _checked_phase(phase: Phase) -> Phase:
    if isinstance(phase, bool) or phase not in list(Phase):
        raise ScheduleError(f"{phase!r} is no phase; give one of {', '.join(p.name for p in Phase)}")
    return Phase(phase)


def interleave(*, low: int, full: int) -> Interleave:
    """``low`` epochs LOW, then ``full`` epochs FULL, and so on.

    Args:
        low: Epochs of LOW in a row.
        full: Epochs of FULL in a row.

    Returns:
        The schedule.

    Raises:
        ScheduleError: For a negative number, or where both are 0.
    """
    return Interleave(low, full)


def aligned(epochs: int, lr_milestones: Sequence[int], last: Phase = Phase.LOW) -> FullBetween:
    """The placement of arXiv 2508.08625 for a run of any length: FULL from 0.4·T to the first decay + 0.1·T.

    Args:
        epochs: T, the number of epochs of the run.
        lr_milestones: The epochs at which the learning rate falls.
        last: The phase after FULL: LOW trains the truncated factors to the end, ADAPTOR a branch beside the frozen
            weight, as the paper does.

    Returns:
        The schedule.

    Raises:
        ScheduleError: Where that leaves no FULL epoch, or where there is no decay to align with.
    """
    check_epochs(epochs)
    if not is_list(lr_milestones) or not all(map(is_whole, lr_milestones)) or not lr_milestones:
        said = f", not {lr_milestones!r}" if lr_milestones else ""
        raise ScheduleError(
            f"aligned needs the epochs of the learning-rate decays{said}; give at least one, such as (30,), or use "
            "interleave"
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
    """One schedule after the other, each counting epochs from its own start.

    Args:
        schedules: The schedules in their order.
        boundaries: The epochs of the run at which the next schedule takes over, one fewer than schedules.

    Returns:
        The schedule.

    Raises:
        ScheduleError: Where the boundaries do not rise from 1 on, or there are too many or too few of them.
    """
    for given, what in ((schedules, "schedules"), (boundaries, "boundaries")):
        if not is_list(given):
            raise ScheduleError(f"join needs its {what} as a list, not {given!r}")
    return Join(tuple(schedules), tuple(boundaries))


def warm_up(full: int) -> FullBetween:
    """``full`` epochs FULL, then LOW to the end (as in Pufferfish, arXiv 2103.03936).

    Args:
        full: Epochs of FULL at the start, 1 or more.

    Returns:
        The schedule.

    Raises:
        ScheduleError: For less than one epoch.
    """
    return FullBetween(0, full)


def paper_cifar10(last: Phase = Phase.ADAPTOR) -> FullBetween:
    """ResNet-20 on CIFAR-10 as in arXiv 2508.08625: 150 epochs, FULL in epochs 55 to 119, LOW before, then ``last``.

    Args:
        last: The phase from epoch 120 on: ADAPTOR as in the paper, or LOW, which trains the truncated factors at less
            cost and leaves a small model.

    Returns:
        The schedule.
    """
    return FullBetween(55, 120, last)


def paper_cifar100(last: Phase = Phase.ADAPTOR) -> FullBetween:
    """WRN-28-10 on CIFAR-100 as in arXiv 2508.08625: 200 epochs, FULL in epochs 80 to 169, LOW before, then ``last``.

    Args:
        last: The phase from epoch 170 on: ADAPTOR as in the paper, or LOW, which trains the truncated factors at less
            cost and leaves a small model.

    Returns:
        The schedule.
    """
    return FullBetween(80, 170, last)
