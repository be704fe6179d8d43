"""Whether what a caller gives is what is asked for, so that a refusal can say it in its own words."""

from __future__ import annotations

import enum
import math
import os
from collections.abc import Collection, Sequence, Set
from numbers import Integral, Real
from pathlib import Path
from types import FunctionType
from typing import TypeGuard

from .errors import DynrankError, ScheduleError, StoreError

_MOST_TICKS = 1_000_000

# A slip, although Python counts with them: True and False, and members of an enumeration such as Phase.
_NO_NUMBERS = (bool, enum.Enum)


def is_whole(value: object, least: int = 0) -> bool:
    """Whether it is a whole number of at least so much."""
    return isinstance(value, Integral) and not isinstance(value, _NO_NUMBERS) and int(value) >= least


def is_number(value: object, least: float = -math.inf, most: float = math.inf) -> bool:
    """Whether it is a finite number within these bounds."""
    return (
        isinstance(value, Real)
        and not isinstance(value, _NO_NUMBERS)
        and math.isfinite(value)
        and least <= float(value) <= most
    )


def is_share(value: object) -> bool:
    """Whether it is a number above 0 and at most 1."""
    return is_number(value, 0, 1) and value != 0


def is_list(value: object) -> TypeGuard[Collection[object]]:
    """Whether it is several values, in an order or as a set. A text is one, whose letters Python would walk through."""
    return isinstance(value, Sequence | Set) and not isinstance(value, str | bytes)


def check_flags(error: type[DynrankError], **flags: object) -> None:
    """Raises such an error for what is neither True nor False, by the name of the argument."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise error(f"{name} is {value!r}: give True or False")


COMPILE_MODES = ("default", "max-autotune-no-cudagraphs")  # those of torch.compile without CUDA graphs


def check_compile(error: type[DynrankError], compile: object) -> None:
    """Raises such an error for what says neither whether to compile nor how."""
    if not isinstance(compile, bool) and compile not in COMPILE_MODES:
        raise error(
            f"compile is {compile!r}: give True, False, or a mode of torch.compile ({', '.join(COMPILE_MODES)})"
        )


def compile_mode(compile: bool | str) -> str | None:
    """The mode for torch.compile, None where none was asked for."""
    return compile if isinstance(compile, str) else None


def checked_path(path: str | os.PathLike[str]) -> Path:
    """It as a Path. Raises StoreError for what is none."""
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise StoreError(f"{path!r} is no name of a file or a folder: give a text or a pathlib.Path")
    return Path(path)


def check_epochs(epochs: int) -> None:
    """Raises ScheduleError for a length that no run can have."""
    if not is_whole(epochs, 1):
        raise ScheduleError(f"a run cannot have {epochs!r} epochs: give a whole number of 1 or more")
    check_length(epochs, "epoch")


def check_length(ticks: int, unit: str) -> None:
    """Raises ScheduleError for a run whose plan, which has a learning rate for each tick, would fill the memory."""
    if ticks > _MOST_TICKS:
        raise ScheduleError(f"a run of {ticks} {unit}s is longer than can be planned: give {_MOST_TICKS:,} or less")


def check_schedule(schedule: object) -> None:
    """Raises ScheduleError for what is none. A class is one only when it has been called, and so is what makes one."""
    if isinstance(schedule, FunctionType) and schedule.__module__.startswith("dynrank_fx.schedules"):
        raise ScheduleError(f"{schedule.__name__} makes a schedule: call it, schedules.{schedule.__name__}(...)")
    if isinstance(schedule, type) or not callable(schedule):
        raise ScheduleError(f"{schedule!r} is no schedule: give one such as schedules.always(Phase.LOW)")


def names_of(kind: type[enum.Enum]) -> str:
    """The members of an enumeration as they are written: ``Phase.FULL, Phase.LOW, Phase.ADAPTOR``."""
    return ", ".join(f"{kind.__name__}.{each.name}" for each in kind)
