"""When weights are dense and when they are factors: pure functions of what is known of a training run; no torch."""

from .auto import Auto, auto
from .by_name import BY_NAME, NamedSchedule
from .fixed import (
    Always,
    FullBetween,
    Interleave,
    Join,
    aligned,
    always,
    interleave,
    join,
    paper_cifar10,
    paper_cifar100,
    warm_up,
)
from .record import EpochRecord, Spectra
from .state import Decision, Schedule, Setting, SiteState, TrainState

__all__ = [
    "BY_NAME",
    "Always",
    "Auto",
    "Decision",
    "EpochRecord",
    "FullBetween",
    "Interleave",
    "Join",
    "NamedSchedule",
    "Schedule",
    "Setting",
    "SiteState",
    "Spectra",
    "TrainState",
    "aligned",
    "always",
    "auto",
    "interleave",
    "join",
    "paper_cifar10",
    "paper_cifar100",
    "warm_up",
]
