"""A digest that lies within the file it is of: to other readers a text like any other.

It is taken of the file with zeros in the place of its own digits. Another digest beside it may be of a second file.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import warnings
import zipfile
from pathlib import Path

from .errors import DynrankWarning, ExportError, StoreError

_DIGITS = 64
_OWN, _BESIDE = b"dynrank-fx sha256 of this file ", b"dynrank-fx sha256 of the weights "


def blank_seals(beside: bool) -> list[str]:
    """The texts to put into a file that is to be sealed. beside: whether its weights lie in a second file."""
    return [mark.decode() + "0" * _DIGITS for mark in (_OWN, _BESIDE)[: 1 + beside]]


def seal(path: Path, beside: Path) -> None:
    """Fill in the blank seals of a file, and of the one beside it if that is there."""
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as data:
        if beside.exists():
            _put(data, _BESIDE, _digest_of(beside))
        _put(data, _OWN, _digest(data, _place(data, _OWN)))
        data.flush()


def check_seal(path: Path) -> None:
    """Warn of a file that is not as it was sealed, as others may have changed it. Raises ExportError where it is, and
    the weights beside it are not.

    A file without a seal is taken as it is.
    """
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            own, beside = _place(data, _OWN), _place(data, _BESIDE)
            if own < 0:
                return
            if _digest(data, own) != data[own : own + _DIGITS]:
                warnings.warn(
                    f"{path} is not as dynrank-fx wrote it: it is damaged, or another tool has changed it",
                    DynrankWarning,
                    stacklevel=3,
                )
                return
            expected = data[beside : beside + _DIGITS] if beside >= 0 else None
    except (OSError, ValueError):  # missing or empty: its reader says so
        return
    real = Path(os.path.realpath(path))
    weights = real.with_name(f"{real.name}.data")
    if expected is not None and weights.exists() and _digest_of(weights) != expected:
        raise ExportError(f"{weights} is damaged, or of another export than {path}: copy both again, or export again")


def check_zip(path: Path) -> None:
    """What torch.save wrote by the checksums that it has, which torch.load does not look at. Raises StoreError."""
    if not zipfile.is_zipfile(path):
        return  # its reader says so
    try:
        with zipfile.ZipFile(path) as file:
            bad = file.testzip()
    except Exception as error:  # of zip, of its compressions, or of the disk
        raise StoreError(f"{path} is damaged ({error}): use an earlier copy, or make it again") from error
    if bad is not None:
        raise StoreError(f"{path} is damaged (in {bad}): use an earlier copy, or make it again")


def _place(data: mmap.mmap, mark: bytes) -> int:
    """Where the digits after a mark begin; negative where there is none."""
    at = data.find(mark)
    return at + len(mark) if at >= 0 else at


def _put(data: mmap.mmap, mark: bytes, digits: bytes) -> None:
    at = _place(data, mark)
    data[at : at + _DIGITS] = digits


def _digest(data: mmap.mmap, at: int) -> bytes:
    view = memoryview(data)
    try:
        digest = hashlib.sha256(view[:at])
        digest.update(b"0" * _DIGITS)
        digest.update(view[at + _DIGITS :])
    finally:
        view.release()
    return digest.hexdigest().encode()


def _digest_of(path: Path) -> bytes:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest().encode()
