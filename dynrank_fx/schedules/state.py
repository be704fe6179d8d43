"""What a schedule is told of a run and of its sites, and what it decides."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from ..phase import Phase


@dataclass(frozen=True)
class SiteState:
    """What is known of one site. dense, low: what it costs in a step of FULL and of LOW, in shares of a dense step.
    groups: of so many matrices, each of the rank, its spectrum has the singular values. pack: the sites that share a
    factor, itself among them, which are in one phase; empty for a site by itself.
    """

    phase: Phase
    rank: int
    dense: float
    low: float
    groups: int = 1
    pack: tuple[str, ...] = ()


@dataclass(frozen=True)
class TrainState:
    """What is known at the start of an epoch.

    epoch: counted from 0. epochs: how many the run will have. lr: learning rate of the first parameter group.
    spectra: per site name the singular values so far, largest first.
    spent: training compute so far, in epochs of the dense model.
    lrs: the learning rate of every epoch of the run, as the scheduler will set it; empty where that is not known.
    sites: the sites by name.
    """

    epoch: int
    epochs: int | None = None
    lr: float | None = None
    spectra: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    spent: float = 0.0
    lrs: tuple[float, ...] = ()
    sites: Mapping[str, SiteState] = field(default_factory=dict)


class Decision(dict[str, Phase]):
    """A phase per site name, with the reasons, one sentence each, that a run records."""

    def __init__(self, phases: Mapping[str, Phase], reasons: Sequence[str] = ()) -> None:
        super().__init__(phases)
        self.reasons = tuple(reasons)


Setting: TypeAlias = Phase | Mapping[str, Phase]

Schedule: TypeAlias = Callable[[TrainState], Setting]
