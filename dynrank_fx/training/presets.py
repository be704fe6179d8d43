"""Whole ways to train: a schedule with everything that goes with it. The practical default, and the paper's own two."""

from __future__ import annotations

from dataclasses import dataclass, field

from .. import schedules
from ..phases import Carry
from ..plan import RankPolicy, Ratio
from ..schedules import Schedule
from .factor_decay import Decay
from .settings import PhaseSettings


@dataclass(frozen=True)
class Preset(PhaseSettings):
    """A way to train: a schedule with the ranks and the settings that go with it."""

    schedule: Schedule
    rank: RankPolicy = field(default_factory=lambda: Ratio(0.25))
    decay: Decay = field(default=Decay.PRODUCT, kw_only=True)


def practical(cost: float = 0.75) -> Preset:
    """What to use where nothing is known: ``auto`` within this share of dense compute, spectral init, the decay of the
    product, a soft landing before every cut, optimizer state that goes along.
    """
    return Preset(schedules.auto(cost), landing=True)


def paper_cifar10() -> Preset:
    """ResNet-20 on CIFAR-10 as in arXiv 2508.08625 and its code: 150 epochs, half the rank, random init, a fresh
    optimizer in each phase, plain weight decay, ADAPTOR last.
    """
    return _paper(schedules.paper_cifar10())


def paper_cifar100() -> Preset:
    """WRN-28-10 on CIFAR-100 as in arXiv 2508.08625 and its code: 200 epochs, and the rest as ``paper_cifar10``."""
    return _paper(schedules.paper_cifar100())


def _paper(schedule: Schedule) -> Preset:
    return Preset(schedule, Ratio(0.5), carry=Carry.RESET, decay=Decay.EACH, random_init=True)
