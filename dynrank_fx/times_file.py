"""The file in which measured times are kept, so that a machine measures a thing once."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from . import files
from .aliases import Json
from .checks import is_number
from .errors import StoreError

Times: TypeAlias = dict[str, list[float] | None]
"""By key the seconds of two things that ran in turn and the ratio of them; None for what could not be run."""


def default_cache() -> Path:
    """``times.json`` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dynrank-fx" / "times.json"


def read_times(path: Path | None) -> Times:
    """The times in a file. What is damaged, or of an earlier version, is measured anew."""
    if path is None or not path.is_file():
        return {}
    try:
        return _checked(json.loads(path.read_text()))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {}


def write_times(path: Path | None, times: Times) -> None:
    """Write the file, whole or not at all, with what others have written meanwhile; without a word where the disk does
    not let it.
    """
    if path is None:
        return
    kept = {**read_times(path), **times}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(path, alone=False) as beside:
            beside.write_text(json.dumps({"times": kept, "sha256": _digest(kept)}))
    except (OSError, StoreError):
        return


def key_of(what: object) -> str:
    """The key of a thing by all that its time depends on, as JSON."""
    return hashlib.sha256(json.dumps(what, default=list).encode()).hexdigest()


def cores() -> int:
    """How many cores the process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _checked(content: Json) -> Times:
    """The times in a cache. Raises ValueError where they are not as they were written."""
    times: Times = {key: _times_in(each) for key, each in content["times"].items()}
    if content["sha256"] != _digest(times):
        raise ValueError("the digest is another one")
    return times


def _digest(times: Mapping[str, Sequence[float] | None]) -> str:
    return hashlib.sha256(json.dumps(times, sort_keys=True).encode()).hexdigest()


def _times_in(entry: object) -> list[float] | None:
    """An entry of the cache. Raises ValueError for what is none."""
    if entry is None:
        return None
    if not isinstance(entry, list) or len(entry) != 3 or not all(is_number(each, 0) for each in entry):
        raise ValueError(entry)
    return entry
