"""Files and folders that appear whole or not at all: written beside their place, then renamed into it."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from .errors import StoreError


def write_text(path: Path, text: str, *, final: Path | None = None) -> None:
    """A text file, written whole or not at all; ``final`` as in ``replacing``. Raises StoreError where the disk
    refuses.
    """
    with replacing(path, final=final) as beside:
        beside.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def replacing(path: Path, *, final: Path | None = None, alone: bool = True) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place if all goes well: on the disk, not only in its cache.

    What else is written beside that (the weights of an ONNX file) goes along, and before it.

    final: where the file will be in the end, for errors to name, if ``path`` is in a folder that is to be renamed.
    alone: nobody else writes the file at the same time; then what a killed write left behind is cleared away.
    Raises StoreError where the disk refuses.
    """
    folder = path.parent / (f".{path.name}.part" if alone else f".{path.name}.{os.getpid()}.part")
    beside = folder / path.name
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir()
        yield beside
        for made in [*(each for each in folder.iterdir() if each != beside), beside]:
            made.chmod(folder.stat().st_mode & 0o666)  # safetensors and onnx make their files private
            with open(made, "r+b") as file:
                os.fsync(file.fileno())
            os.replace(made, path.with_name(made.name))
        _sync_folder(path.parent)
    except (OSError, SafetensorError) as error:
        raise StoreError(
            f"{final or path} could not be written ({why(error)}); what was there before is unchanged"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def why(error: Exception) -> str:
    """What the disk says, without the number of the error and the path, which the sentence around it names."""
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def replacing_folder(path: Path, names: frozenset[str]) -> Iterator[Path]:
    """A new folder that takes the place of ``path`` at the end, with all its files or not at all.

    names: the files that may be in a folder there already; anything else in it is somebody's work and is not touched.
    Write its files with ``final``, so that an error names the place they were meant for.
    Raises StoreError where the folder has other files or the disk refuses.
    """
    if path.exists() and not path.is_dir():
        raise StoreError(f"{path} is a file; give the name of a folder")
    foreign = sorted({p.name for p in path.iterdir()} - names) if path.exists() else []
    if foreign:
        raise StoreError(f"{path} holds {foreign[0]}, which is not ours to replace; choose an empty or a new folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
    except OSError as error:
        raise StoreError(f"{path} could not be written ({why(error)}); nothing was changed") from error
    old, new = beside / "old", beside / "new"
    try:
        new.mkdir()
        yield new
        if path.exists():
            os.rename(path, old)
        os.rename(new, path)
        _sync_folder(path.parent)
    except BaseException as error:
        if old.exists() and not path.exists():
            os.rename(old, path)
        if isinstance(error, OSError):
            raise StoreError(f"{path} could not be written ({why(error)}); what was there is unchanged") from error
        raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)
