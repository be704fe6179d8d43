"""Files that can be trusted: safetensors and JSON, checksummed, written beside and renamed into place."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import StoreError

VERSION = 1
_FORMAT = "dynrank-fx store"


def write(path: Path, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
    """One safetensors file with ``tensors`` and the JSON value ``info``; a kill at any moment leaves the old file.

    Names of one and the same tensor are stored once and come back as one. Raises StoreError where the disk refuses.
    """
    first: dict[int, str] = {}
    aliases = {name: first.setdefault(id(tensor), name) for name, tensor in tensors.items()}
    kept = {name: tensors[name].detach().cpu().contiguous() for name in first.values()}
    # Two names of one storage under different views would be refused by safetensors: copy those.
    storages: set[int] = set()
    for name, tensor in kept.items():
        pointer = tensor.untyped_storage().data_ptr()
        if tensor.numel() and pointer in storages:
            kept[name] = tensor.clone()
        storages.add(pointer)
    text = json.dumps({"info": info, "aliases": {a: b for a, b in aliases.items() if a != b}}, ensure_ascii=True)
    metadata = {"format": _FORMAT, "version": str(VERSION), "content": text, "sha256": _checksum(kept, text)}
    with replacing(path) as beside:
        save_file(kept, beside, metadata)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """``(tensors, info)`` as they were given to ``write``, on the CPU.

    Raises StoreError for a missing, foreign, damaged or truncated file, and for one of a newer version.
    """
    before = _identity(path)
    try:
        return _read(path)
    except StoreError:
        # safetensors opens a file twice, and a running training may replace it in between.
        if _identity(path) == before:
            raise
    return read(path)


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except FileNotFoundError as error:
        raise StoreError(f"there is no file {path}") from error
    except (OSError, SafetensorError, ValueError) as error:
        raise StoreError(f"{path} is damaged or not a safetensors file ({error}); use an earlier copy") from error
    if metadata.get("format") != _FORMAT:
        raise StoreError(f"{path} was not written by dynrank-fx, or its header is damaged")
    if metadata.get("version") != str(VERSION):
        raise StoreError(
            f"{path} has version {metadata.get('version')} and this dynrank-fx reads version {VERSION}; upgrade "
            f"dynrank-fx"
        )
    text = metadata.get("content", "")
    if _checksum(tensors, text) != metadata.get("sha256"):
        raise StoreError(f"{path} is damaged: its checksum does not match its content; use an earlier copy")
    content = json.loads(text)
    for alias, name in content["aliases"].items():
        tensors[alias] = tensors[name]
    return tensors, content["info"]


def _checksum(tensors: Mapping[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_text(path: Path, text: str) -> None:
    """A text file, written whole or not at all. Raises StoreError where the disk refuses."""
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place if all goes well: on the disk, not only in its cache.

    It is in a folder of a fixed name, so that the next write clears away what a killed one left. Raises StoreError
    where the disk refuses.
    """
    folder = path.parent / f".{path.name}.part"
    beside = folder / path.name
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir()
        yield beside
        beside.chmod(folder.stat().st_mode & 0o666)  # safetensors makes its files private
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
        _sync_folder(path.parent)
    except (OSError, SafetensorError) as error:
        raise StoreError(f"{path} could not be written ({_why(error)}); what was there before is unchanged") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _why(error: Exception) -> str:
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
        raise StoreError(f"{path} could not be written ({_why(error)}); nothing was changed") from error
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
        if isinstance(error, StoreError):
            raise StoreError(str(error).replace(str(new), str(path))) from error
        if isinstance(error, OSError):
            raise StoreError(f"{path} could not be written ({_why(error)}); what was there is unchanged") from error
        raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)
