"""What a schedule is told of a run and of its sites, and what it decides."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from ..checks import check_epochs, is_whole
from ..errors import ScheduleError
from ..phase import Phase


@dataclass(frozen=True)
class SiteState:
    """What is known of one site at the start of an epoch.

    Attributes:
        phase: The phase that the site is in.
        rank: The rank of its factors.
        dense: What it costs in a step of FULL, as a share of a step of the dense model, from 0 to 1.
        low: What it costs in a step of LOW, as a share of a step of the dense model.
        groups: How many matrices the weight consists of; its spectrum has the singular values of all of them, and each
            is cut to ``rank``.
        sharing: The sites that share a factor, this one among them, which are always in one phase; empty for a site by
            itself.
    """

    phase: Phase
    rank: int
    dense: float
    low: float
    groups: int = 1
    sharing: tuple[str, ...] = ()


@dataclass(frozen=True)
class TrainState:
    """What a schedule may look at: all that is known at the start of a tick.

    A tick is an epoch. In a run that is counted in optimizer steps, or has one epoch only, it is a number of steps, by
    default a twentieth of the run; what is said of epochs is then said of ticks. So it is where up to five epochs are
    divided, for a schedule with a true attribute ``within_epochs``: one that does not count them.

    Attributes:
        epoch: The epoch that begins, counted from 0.
        epochs: How many epochs the run will have; None where that is not known.
        lr: The learning rate of the optimizer's first parameter group; None where that is not known.
        spectra: By site name the singular values of the site as it is now, largest first.
        spent: Training compute so far, in epochs of the dense model: in FLOPs, or in measured time where costs are
            counted so (``PhaseSettings.cost_by``), and so are those of the sites.
        lrs: The learning rate of every epoch of the run, as the scheduler will set it; empty where that is not known.
        sites: What is known of each site, by name.
        unit: What a tick is called in sentences: ``epoch`` or ``tick``.

    Raises:
        ScheduleError: For an epoch that cannot be, or a number of epochs.
    """

    epoch: int
    epochs: int | None = None
    lr: float | None = None
    spectra: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    spent: float = 0.0
    lrs: tuple[float, ...] = ()
    sites: Mapping[str, SiteState] = field(default_factory=dict)
    unit: str = "epoch"

    def __post_init__(self) -> None:
        if not is_whole(self.epoch):
            raise ScheduleError(f"there is no epoch {self.epoch!r}: give a whole number, counted from 0")
        if self.epochs is not None:
            check_epochs(self.epochs)


@dataclass(frozen=True)
class Decision:
    """What a schedule decided, with the reasons that a run records.

    Attributes:
        phases: A phase per site name or pattern; sites that it does not name keep theirs.
        reasons: Why, one sentence each.
    """

    phases: Mapping[str, Phase]
    reasons: tuple[str, ...] = ()


Setting: TypeAlias = Phase | Mapping[str, Phase] | Decision
"""One phase for every site, or a phase per site name or pattern (sites it does not name keep theirs)."""

Schedule: TypeAlias = Callable[[TrainState], Setting]
"""A pure function of the state: the same state always gives the same setting."""
