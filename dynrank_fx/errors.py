"""The exceptions of this package: each message is one sentence saying what is wrong, where, and what to do."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PACKAGE = str(Path(__file__).parent)


class DynrankError(Exception):
    """A mistake the caller can mend. The commands print its message without a traceback and exit with 1."""

    def __str__(self) -> str:
        return " ".join(super().__str__().split("\n"))  # of a value that is shown, as a tensor is


class CaptureError(DynrankError):
    """The model could not be turned into a graph; the message names the module and the line."""


class PlanError(DynrankError):
    """A plan, a rank or a name pattern does not fit the model."""


class TransitionError(DynrankError):
    """A phase change was refused; the net and the optimizer are as they were."""


class DivergedError(DynrankError):
    """Training has come to numbers that are not finite."""


class StoreError(DynrankError):
    """A file could not be written, or what was read is damaged, from another model, or from a newer version."""


class CalibrationError(DynrankError):
    """Calibration data are missing, do not fit the model, or lead to numbers that are not finite."""


class ExportError(DynrankError):
    """The ONNX file could not be made, or does not agree with PyTorch; no file was written."""


class ModelFileError(DynrankError):
    """The user's model file is missing, broken, or lacks a function that the command needs."""


class ScheduleError(DynrankError):
    """A schedule that cannot be: no epochs to alternate, or no decay to align with."""


class DynrankWarning(UserWarning):
    """Something was done that the caller may not expect, such as optimizer state that had to be reset."""


def first_line(error: BaseException) -> str:
    """The kind of an error and the first line of what it says, without a full stop."""
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)  # not its number
    lines = said.strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__


def reason(error: BaseException) -> str:
    """The first line of the error at the bottom of it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)


@contextmanager
def telling(what: str, kind: type[DynrankError]) -> Iterator[None]:
    """Around a call of a function that the caller gave: what it raises is told as such an error, with its line."""
    try:
        yield
    except DynrankError:
        raise
    except Exception as error:
        raise kind(f"{what} raised {first_line(error)}{_place(error)}: mend it") from error


def _place(error: BaseException) -> str:
    """The innermost line of the file in which the caller's function is, where Python knows it."""
    frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    theirs = [each for each in frames if not each[0].startswith(_PACKAGE)]
    if not theirs:
        return ""
    file, line = [each for each in theirs if each[0] == theirs[0][0]][-1]
    return f" ({Path(file).name}, line {line})"
