"""What the callbacks for other trainers share: their choices, and the phases that they hold."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import TransitionError
from ..phases import averages_in
from ..rewrite import switched_modules
from ..schedules import EpochRecord, Schedule
from ..tracing import is_captured
from ..training import Phases, PhaseSettings, practical


class PhasesHolder:
    """A schedule, with how its phases are entered, for the callbacks of other trainers.

    Args:
        schedule: Which phase each site is in, epoch by epoch; see ``dynrank_fx.schedules``.
        every: Optimizer steps from one decision of the schedule to the next; by default an epoch or, in a run that is
            given in steps or has one epoch, a twentieth of it. ``auto`` goes by parts of two to five epochs.
        averages: Averages of the net's weights that come along at every switch, as in ``enter_``. Lightning's own
            callbacks for averages are found by themselves.
        **choices: Fields of ``PhaseSettings``, by name; the others are those of the practical preset.

    Attributes:
        phases: The ``Phases`` at work once training has begun, None before.
    """

    def __init__(
        self,
        schedule: Schedule,
        *,
        every: int | None = None,
        averages: object = (),
        **choices: Any,  # Any: each is of its field's type
    ) -> None:
        self.schedule, self.every, self.averages = schedule, every, averages_in(averages)
        self.settings = PhaseSettings(**(practical().choices | choices))
        self.phases: Phases | None = None

    @property
    def history(self) -> list[EpochRecord]:
        """A record of every epoch (or tick) begun; empty before training has begun."""
        return self.phases.history if self.phases is not None else []


def net_in(module: nn.Module) -> nn.Module:
    """The outermost part of a module that ``transform`` made.

    Args:
        module: The net itself, or a module that holds it.

    Returns:
        The net.

    Raises:
        TransitionError: Where the module holds no net with sites.
    """
    for part in module.modules():
        if is_captured(part) and switched_modules(part):
            return part
    raise TransitionError("the model holds no net with sites: give the trainer what transform made of it")
