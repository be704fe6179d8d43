"""What the callbacks for other trainers share: their choices, and the phases that they hold."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..aliases import StateDict
from ..checks import checked_path
from ..errors import StoreError, TransitionError, first_line
from ..phases import averages_in
from ..rewrite import switched_modules
from ..schedules import EpochRecord, Schedule
from ..seals import check_zip
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

    def end_earlier(self) -> None:
        """Take an earlier training's phases off its optimizer, which may be the one of the next training too.

        Until then they stay, since a checkpoint may be asked for after the end.
        """
        if self.phases is not None:
            self.phases.remove()

    @property
    def history(self) -> list[EpochRecord]:
        """A record of every epoch (or tick) begun, or of the last ones after a resume; empty before training."""
        return self.phases.history if self.phases is not None else []


def refuse_engine(engine: str, instead: str) -> None:
    """Raise TransitionError for a way of training in several processes that phases do not go with.

    Args:
        engine: What it is called.
        instead: What to do.

    Raises:
        TransitionError: Always.
    """
    raise TransitionError(f"phases do not go with {engine}, which holds parameters in a form of its own: {instead}")


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


def read_pickled(path: str | Path) -> StateDict:
    """What ``torch.save`` wrote, as tensors and plain values: nothing in the file is run.

    Args:
        path: The file.

    Returns:
        The dict that it holds.

    Raises:
        StoreError: For what is no such file, for a damaged one, and for one that holds objects which only running code
            would read.
    """
    path = checked_path(path)
    check_zip(path)
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise StoreError(f"there is no checkpoint {path}") from error
    except pickle.UnpicklingError as error:
        raise StoreError(
            f"{path} is damaged, or holds objects that only running code would read ({first_line(error)}): if "
            "you trust it, allow their classes by torch.serialization.add_safe_globals first"
        ) from error
    except Exception as error:  # of zip, of pickle, or of torch
        raise StoreError(f"{path} could not be read as a checkpoint ({first_line(error)})") from error
    if not isinstance(data, Mapping):
        raise StoreError(f"{path} holds a {type(data).__name__}, and is no checkpoint")
    return dict(data)
