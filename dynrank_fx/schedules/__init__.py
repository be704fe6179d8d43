"""When weights are dense and when they are factors: pure functions of what is known of a training run; no torch."""

from .fixed import aligned, always, auto, interleave, join, paper_cifar10, paper_cifar100, warm_up
from .state import Schedule, Setting, SiteState, TrainState

__all__ = [
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
