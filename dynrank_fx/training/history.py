"""The history of a run as a file of JSON lines, which only grows: a checkpoint says how much of it is its own.

Spectra are as much as all the rest, and only those of the last cuts are looked at: they are kept in the checkpoint.

Each line's digest goes over the one before it, first the name of the run: a checkpoint that holds the last one knows
all of them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from .. import files
from ..aliases import JsonObject
from ..errors import StoreError
from ..schedules import EpochRecord
from ..text import counted
from .lines import lines_of, records_in


@dataclass(frozen=True)
class Log:
    """A file with so many records, its first bytes, and the digest of the last."""

    path: Path
    records: int
    size: int
    digest: str

    def to_json(self) -> JsonObject:
        """What a checkpoint says of it."""
        return {**asdict(self), "path": self.path.name}


def grown(log: Log | None, path: Path, name: str, history: Sequence[EpochRecord]) -> Log:
    """Bring the file of a run of this name up to its history, on the disk and not only in its cache.

    log: what is known to be there; without it the file is written anew. What lies behind is of a run that was killed
    before its checkpoint, and goes. Raises StoreError where the disk refuses.
    """
    known = log is not None and log.path == path and log.records <= len(history) and _size(path) >= log.size
    start = log if known and log is not None else Log(path, 0, 0, name)
    lines = [json.dumps(line, allow_nan=False) + "\n" for line in lines_of(history, start.records)]
    digest, data = start.digest, "".join(lines).encode()
    for line in lines:
        digest = _digest(digest, line.encode())
    if not known:
        files.write_text(path, data.decode())
    elif data or _size(path) != start.size:
        try:
            with open(path, "r+b") as file:
                file.truncate(start.size)
                file.seek(start.size)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise StoreError(
                f"{path} could not be written ({files.why(error)}); the last checkpoint is unchanged"
            ) from error
    return Log(path, len(history), start.size + len(data), digest)


def read_history(path: Path, name: str, told: JsonObject) -> tuple[list[JsonObject], Log]:
    """The records that a checkpoint says it has. Raises StoreError where they are not there as they were written."""
    data = b""
    if told["size"]:
        try:
            with open(path, "rb") as file:
                data = file.read(told["size"])
        except OSError as error:
            raise StoreError(
                f"{path} could not be read ({files.why(error)}), which the checkpoint beside it needs: put it back"
            ) from error
    lines, digest = data.splitlines(keepends=True), name
    for line in lines:
        digest = _digest(digest, line)
    if (len(lines), digest) != (told["records"], told["digest"]):
        raise StoreError(
            f"{path} is damaged or of another run: it does not begin with the {counted(told['records'], 'record')} "
            "that the checkpoint beside it was written with; put back the file that belongs to it"
        )
    return records_in([json.loads(line) for line in lines]), Log(path, len(lines), len(data), digest)


def add_(history: list[EpochRecord], record: EpochRecord) -> None:
    """The record at the end; those before it forget the spectra of sites that it has some of."""
    new = record.switch_spectra.keys()
    for index, earlier in enumerate(history):
        if not new.isdisjoint(earlier.switch_spectra):
            kept = {site: spectra for site, spectra in earlier.switch_spectra.items() if site not in new}
            history[index] = replace(earlier, switch_spectra=kept)
    history.append(record)


def spectra_of(history: Sequence[EpochRecord]) -> JsonObject:
    """The spectra in a history: by site its last record that has some, before, and after."""
    return {
        site: [index, list(before), list(after)]
        for index, record in enumerate(history)
        for site, (before, after) in record.switch_spectra.items()
    }


def with_spectra(records: Sequence[JsonObject], spectra: JsonObject) -> list[JsonObject]:
    """The records with what ``spectra_of`` told of them."""
    whole = [dict(record) for record in records]
    for site, (index, before, after) in spectra.items():
        whole[index].setdefault("switch_spectra", {})[site] = [before, after]
    return whole


def _digest(before: str, line: bytes) -> str:
    return hashlib.sha256(before.encode() + line).hexdigest()


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else -1
