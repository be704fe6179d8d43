"""What the callbacks for other trainers share: their choices, and the phases that they hold."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import TransitionError
from ..rewrite import switched_modules
from ..schedules import EpochRecord, Schedule
from ..tracing import is_captured
from ..training import Phases, PhaseSettings, practical


class PhasesHolder:
    """A schedule with how it is entered; ``phases`` once training has begun.

    choices: those of ``PhaseSettings``, by name; for the others the practical preset's. ``history`` has a record of
    every epoch.
    """

    def __init__(self, schedule: Schedule, **choices: Any) -> None:
        self.schedule = schedule
        self.settings = PhaseSettings(**(practical().choices | choices))
        self.phases: Phases | None = None

    @property
    def history(self) -> list[EpochRecord]:
        return self.phases.history if self.phases is not None else []


def net_in(module: nn.Module) -> nn.Module:
    """The outermost part of a module that ``transform`` made. Raises TransitionError where none with sites is."""
    for part in module.modules():
        if is_captured(part) and switched_modules(part):
            return part
    raise TransitionError("the model holds no net with sites: give the trainer what transform made of it")
