"""What the callbacks for other trainers share: their choices, and the phases that they hold."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import TransitionError
from ..phases import Carry
from ..rewrite import switched_modules
from ..schedules import Schedule
from ..tracing import is_captured
from ..training import Decay, Phases


class PhasesHolder:
    """A schedule with how it is entered; ``phases`` once training has begun.

    carry, rewarm, decay, landing: as in ``dynrank_fx.Phases``; the defaults are those of the practical preset.
    ``history`` has a record of every epoch.
    """

    def __init__(
        self,
        schedule: Schedule,
        *,
        carry: Carry = Carry.MOVE,
        rewarm: int = 0,
        decay: Decay = Decay.PRODUCT,
        landing: bool = True,
    ) -> None:
        self.schedule = schedule
        self.how: dict[str, Any] = {"carry": carry, "rewarm": rewarm, "decay": decay, "landing": landing}
        self.phases: Phases | None = None

    @property
    def history(self) -> list[dict[str, Any]]:
        return self.phases.history if self.phases is not None else []


def net_in(module: nn.Module) -> nn.Module:
    """The outermost part of a module that ``transform`` made. Raises TransitionError where none with sites is."""
    for part in module.modules():
        if is_captured(part) and switched_modules(part):
            return part
    raise TransitionError("the model holds no net with sites: give the trainer what transform made of it")
