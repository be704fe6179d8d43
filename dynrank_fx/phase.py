"""Phases of a site, and the facts a schedule may look at. No torch here: a schedule is plain Python."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

ALPHA = 16.0
"""The branch of an ADAPTOR is multiplied by this over its rank: the constant of the paper's code (arXiv 2508.08625)."""


class Phase(enum.IntEnum):
    """What a site trains.

    The module of a site stores the plain ``int``: Dynamo guards an Enum by identity and mixes up sites
    that share one, so that results of mixed settings are silently wrong.
    """

    FULL = 0
    """The dense weight trains."""
    LOW = 1
    """Only the factors exist and train."""
    ADAPTOR = 2
    """A frozen dense base plus a trained low-rank branch of scale ``ALPHA / rank``: the paper's own last phase."""


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
"""One phase for every site, or a phase per site name or pattern (sites it does not name keep theirs)."""

Schedule: TypeAlias = Callable[[TrainState], Setting]
"""A pure function of the state: the same state always gives the same setting."""
