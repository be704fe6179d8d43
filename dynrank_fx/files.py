"""Files and folders that appear whole or not at all: written beside their place, then renamed into it.

What is half done lies in a folder ``.NAME.part``, whose lock its process holds: one that nobody holds is of a process
that was killed. It is cleared away by the next writer, or brought to its end where ``_READY`` says that all is there.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import os
import shutil
import socket
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from .errors import StoreError

if sys.platform != "win32":
    import fcntl

_READY, _OLD, _NEW = ".ready", ".old", "new"
_LOCK = ".lock"  # of a folder that one process works in
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux's renameat2
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def check_file_place(path: Path) -> Path:
    """Where a file of this name is really written: a symlink stays, and its target is replaced.

    Raises StoreError where anything but a regular file stands.
    """
    return _place(path, stat.S_IFREG, "file")


def check_folder_place(path: Path) -> Path:
    """As ``check_file_place``, of a folder."""
    return _place(path, stat.S_IFDIR, "folder")


def _place(path: Path, wanted: int, what: str) -> Path:
    try:
        kind = stat.S_IFMT(path.stat().st_mode)  # before the link is read: those of /proc lead nowhere
        if kind != wanted:
            raise StoreError(f"{path} is {_KINDS.get(kind, 'a file')}: give the name of a {what}")
    except FileNotFoundError:
        pass
    except OSError as error:
        raise StoreError(f"{path} could not be written ({why(error)}); nothing was changed") from error
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def write_text(path: Path, text: str, *, final: Path | None = None) -> None:
    """A text file, written whole or not at all; ``final`` as in ``replacing``. Raises StoreError where the disk
    refuses.
    """
    with replacing(path, final=final) as beside:
        beside.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def replacing(path: Path, *, final: Path | None = None, alone: bool = True) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place if all goes well: on the disk, not only in its cache.

    What else is written beside that (the weights of an ONNX file) goes along, and before it. A kill in between leaves
    no file under the name rather than one beside weights of another; ``finish`` completes it.

    final: where the file will be in the end, for errors to name, if ``path`` is in a folder that is to be renamed.
    alone: nobody else writes the file at the same time.
    Raises StoreError where the disk refuses, or where something else than a file stands.
    """
    place = check_file_place(path)
    folder = place.parent / (f".{place.name}.part" if alone else f".{place.name}.{os.getpid()}.part")
    beside = folder / place.name
    try:
        if not alone:
            _clear(place.parent, f".{glob.escape(place.name)}.*.part")
        finish(place)
        with _held(folder):
            yield beside
            made = [*(each for each in folder.iterdir() if each != beside), beside]
            for each in made:
                each.chmod(folder.stat().st_mode & 0o666)  # safetensors and onnx make their files private
                with open(each, "r+b") as file:
                    os.fsync(file.fileno())
            _move(folder, made, place)
            _sync_folder(place.parent)
    except BlockingIOError as error:
        raise StoreError(f"another process is writing {final or path}: let it end, or choose another name") from error
    except OSError as error:
        raise StoreError(
            f"{final or path} could not be written ({why(error)}); what was there before is unchanged"
        ) from error


def _move(folder: Path, made: list[Path], place: Path) -> None:
    """Give files their names, that of ``place`` at last. Several cannot be swapped at once: the old ones step aside."""
    if len(made) == 1:
        os.replace(made[0], place)
        return
    old = folder / _OLD
    old.mkdir()
    (folder / _READY).touch()
    _sync_folder(folder)
    try:
        for each in reversed(made):
            if place.with_name(each.name).exists():
                os.rename(place.with_name(each.name), old / each.name)
        for each in made:
            os.replace(each, place.with_name(each.name))
    except BaseException:
        for each in [*(e for e in old.iterdir() if e.name != place.name), *old.glob(place.name)]:
            os.replace(each, place.with_name(each.name))
        raise


def finish(path: Path) -> None:
    """Complete what a killed process had all but done (files whose names it was changing, or a folder), and clear away
    what it had only begun.

    Everybody who reads such a place calls it first.
    """
    place = Path(os.path.realpath(path))
    folder = place.parent / f".{place.name}.part"
    if not (folder / _READY).exists():
        _clear(place.parent, glob.escape(folder.name))
        return
    with contextlib.suppress(OSError), _lock(folder, wait=True):
        if (folder / _NEW).is_dir():
            if not place.exists():
                os.rename(folder / _NEW, place)
        elif (folder / _READY).exists():
            made = [each for each in folder.iterdir() if each.name not in (_READY, _OLD)]
            for each in sorted(made, key=lambda each: each.name == place.name):
                os.replace(each, place.with_name(each.name))
        _sync_folder(place.parent)
        shutil.rmtree(folder, ignore_errors=True)


def scratch(prefix: str) -> contextlib.AbstractContextManager[Path]:
    """A folder in the system's temporary one, gone at the end; those of killed processes go first."""
    parent = Path(tempfile.gettempdir())
    _clear(parent, f"{prefix}*")
    # Another process may take it for a dead one's before it is locked here, and clear it away.
    return _held(Path(tempfile.mkdtemp(prefix=prefix, dir=parent)), wait=True)


def _clear(parent: Path, pattern: str) -> None:
    """Remove the folders that no living process holds."""
    for folder in parent.glob(pattern):
        with contextlib.suppress(OSError), _lock(folder):
            if not (folder / _READY).exists():  # which is for ``finish``
                shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _held(folder: Path, *, wait: bool = False) -> Iterator[Path]:
    """The folder, made empty, with its lock, and gone at the end. Raises BlockingIOError where another holds it, unless
    it is to wait for that one.
    """
    with contextlib.ExitStack() as stack:
        while True:
            with contextlib.suppress(FileNotFoundError), _lock(folder, wait=wait):
                shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(mode=0o777)
            try:
                stack.enter_context(_lock(folder, wait=wait))
                break
            except FileNotFoundError:  # somebody took it for a dead process's before it was locked
                continue
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _lock(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """The lock of a folder. Raises BlockingIOError where a living process holds it, FileNotFoundError where it has
    gone.
    """
    if sys.platform == "win32":
        yield
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise
        except OSError:
            pass  # a disk without locks, as some of networks: then as if nobody held it
        if os.fstat(handle).st_ino != folder.stat().st_ino:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fspath(folder))
        yield
    finally:
        os.close(handle)


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
    place = check_folder(path, names)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        finish(place)
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(_held(place.parent / f".{place.name}.part"))
            (folder / _NEW).mkdir()
            yield folder / _NEW
            _put(folder, place)
            _sync_folder(place.parent)
    except BlockingIOError as error:
        raise StoreError(f"another process is writing {path}: let it end, or choose another name") from error
    except OSError as error:
        raise StoreError(f"{path} could not be written ({why(error)}); what was there is unchanged") from error


def check_folder(path: Path, names: frozenset[str]) -> Path:
    """As ``check_folder_place``. Raises StoreError where the folder there has other files than those of ours too."""
    place = check_folder_place(path)
    try:
        foreign = sorted({p.name for p in place.iterdir()} - names) if place.exists() else []
    except OSError as error:
        raise StoreError(f"{path} could not be read ({why(error)}); choose another folder") from error
    if foreign:
        raise StoreError(f"{path} holds {foreign[0]}, which is not ours to replace; choose an empty or a new folder")
    return place


def _put(folder: Path, place: Path) -> None:
    """The new folder into its place: at once where the system can, else so that ``finish`` completes it."""
    new, old = folder / _NEW, folder / _OLD
    if not place.exists():
        os.rename(new, place)
    elif not _exchanged(new, place):
        (folder / _READY).touch()
        _sync_folder(folder)
        os.rename(place, old)
        try:
            os.rename(new, place)
        except BaseException:
            os.rename(old, place)
            raise


def _exchanged(one: Path, other: Path) -> bool:
    """Whether the two have changed names, which Linux does at one moment; False where it cannot."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    names = os.fsencode(one), os.fsencode(other)
    return bool(rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0)


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Nobody else trains in the folder until the end; the lock of a process that has gone holds nobody up.

    Raises StoreError where somebody does.
    """
    if sys.platform == "win32" or not folder.is_dir():
        yield
        return
    handle = _opened_lock(folder)
    try:
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()} (since {since})".encode(), 0)
        _clear(folder, ".*.part")
        yield
    finally:
        (folder / _LOCK).unlink(missing_ok=True)
        os.close(handle)


def _opened_lock(folder: Path) -> int:
    path = folder / _LOCK
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise StoreError(f"{folder} cannot be written to ({why(error)}); choose another --out") from error
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: a data loader's workers would inherit it
        except (BlockingIOError, PermissionError) as error:
            who = os.pread(handle, 1000, 0).decode(errors="replace") or "another process"
            os.close(handle)
            raise StoreError(f"{who} trains in {folder}: wait for it, stop it, or choose another --out") from error
        except OSError:
            return handle  # a disk without locks, as some of networks
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(handle).st_ino == path.stat().st_ino:
                return handle
        os.close(handle)  # whoever held it has just gone, and the file with it
