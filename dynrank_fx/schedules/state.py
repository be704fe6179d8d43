"""What a schedule is told of a run and of its sites, and what it decides."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from ..phase import Phase


@dataclass(frozen=True)
class SiteState:
    """What is known of one site. dense, low: what it costs in a step of FULL and of LOW, in shares of a dense step.
    groups: of so many matrices, each of the rank, its spectrum has the singular values. sharing: the sites that share
    a factor, itself among them, which are in one phase; empty for a site by itself.
    """

    phase: Phase
    rank: int
    dense: float
    low: float
    groups: int = 1
    sharing: tuple[str, ...] = ()


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


@dataclass(frozen=True)
class Decision:
    """A phase per site name or pattern, with the reasons, one sentence each, that a run records."""

    phases: Mapping[str, Phase]
    reasons: tuple[str, ...] = ()


Setting: TypeAlias = Phase | Mapping[str, Phase] | Decision
"""One phase for every site, or a phase per site name or pattern (sites it does not name keep theirs)."""

Schedule: TypeAlias = Callable[[TrainState], Setting]
"""A pure function of the state: the same state always gives the same setting."""
