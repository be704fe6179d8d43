"""When weights are dense and when they are factors: pure functions of what is known of a training run; no torch."""

from .auto import Auto
from .fixed import (
    Always,
    FullBetween,
    Interleave,
    Join,
    aligned,
    always,
    auto,
    interleave,
    join,
    paper_cifar10,
    paper_cifar100,
    warm_up,
)
from .state import Schedule, Setting, SiteState, TrainState

__all__ = [
    "Always",
    "Auto",
    "FullBetween",
    "Interleave",
    "Join",
    "Schedule",
    "Setting",
    "SiteState",
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
