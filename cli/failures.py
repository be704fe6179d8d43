"""What code of the user raised, as one sentence: the file, its line, and the error."""

from __future__ import annotations

import linecache
import re
import textwrap
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dynrank_fx.errors import DynrankError, ModelFileError, first_line

MODULE = "dynrank_model_"
"""How the names of modules begin that are made of model files."""


@contextmanager
def users_code(path: Path, what: str) -> Iterator[None]:
    """A failure of the user's code told as ModelFileError; ``what`` is named where no line of the file is at fault."""
    try:
        yield
    except (Exception, SystemExit) as error:
        # Of ours is what was told before, and what our own code says about the user's.
        if isinstance(error, DynrankError) and not _lines(error, path):
            raise
        raise ModelFileError(told(error, path, what)) from error


def blamed(error: BaseException) -> ModelFileError | None:
    """The error as one of a model file, where it was raised by one, whoever called it; None for an error of ours."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    files = [each.f_code.co_filename for each in frames if str(each.f_globals.get("__name__")).startswith(MODULE)]
    if files:
        return ModelFileError(told(error, Path(files[-1]), "its code"))
    if isinstance(error, SystemExit):  # the commands end by click's own
        return ModelFileError(f"the model file, or what it imports, raised SystemExit: {error.code}: take that out")
    return None


def of_the_machine(error: BaseException) -> DynrankError | None:
    """The error as one of the disk or of memory; None for any other."""
    if isinstance(error, OSError) and error.filename is not None:
        return DynrankError(f"{error.filename} could not be used ({error.strerror}): give another place")
    # Of PyTorch's allocators only that of a GPU has a kind of error of its own.
    full = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
    if full or isinstance(error, MemoryError):
        return DynrankError(f"there is not enough memory ({first_line(error)}): give smaller batches")
    return None


def told(error: BaseException, path: Path, what: str) -> str:
    """``model.py, line 12: x = 1/0 raised ...``, with the innermost line of the file, or ``what`` where none is."""
    lines, reason = _lines(error, path), str(error)
    if isinstance(error, SyntaxError) and error.filename == str(path):
        lines, reason = [error.lineno] if error.lineno else [], error.msg
    if "Original Traceback" in reason:  # of a data loader's process, whose frames are text
        lines = [int(number) for number in re.findall(rf'File "{re.escape(str(path))}", line (\d+)', reason)]
        reason = reason.strip().splitlines()[-1].removeprefix(f"{type(error).__name__}: ")
    where = path.name
    if lines:
        where += f", line {lines[-1]}"
        linecache.checkcache(str(path))
        what = linecache.getline(str(path), lines[-1]).strip() or what
    reason = textwrap.shorten(reason, 300, placeholder=" ...")
    if any("operator torchvision::" in str(each) for each in _behind(error)):  # timm and transformers hide it
        reason += (
            " (torchvision is of another build than torch: install both from one place, such as "
            "`pip install torch torchvision --index-url https://download.pytorch.org/whl/cpu`)"
        )
    return f"{where}: {what} raised {type(error).__name__}" + (f": {reason}" if reason else "")


def _behind(error: BaseException) -> Iterator[BaseException]:
    """The error, and those that it came of."""
    here: BaseException | None = error
    while here is not None:
        yield here
        here = here.__cause__ or here.__context__


def _lines(error: BaseException, path: Path) -> list[int]:
    """The lines of the file that the error came through."""
    frames = traceback.walk_tb(error.__traceback__)
    return [number for frame, number in frames if frame.f_code.co_filename == str(path)]
