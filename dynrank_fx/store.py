"""Files that can be trusted: safetensors and JSON, checksummed, written beside and renamed into place."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .aliases import JsonObject
from .errors import StoreError
from .files import replacing

Result = TypeVar("Result")

VERSION = 1
_KNOWN = ("1", "2")  # 2: a run whose history is beside it
_FORMAT = "dynrank-fx store"


def write(
    path: Path,
    tensors: Mapping[str, Tensor],
    info: JsonObject,
    *,
    final: Path | None = None,
    version: int = VERSION,
) -> None:
    """One safetensors file with ``tensors`` and the JSON value ``info``; a kill at any moment leaves the old file.

    Names of one and the same tensor are stored once and come back as one. final: as in ``replacing``. version: of what
    ``info`` says. Raises StoreError where the disk refuses.
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
    metadata = {"format": _FORMAT, "version": str(version), "content": text, "sha256": _checksum(kept, text)}
    with replacing(path, final=final) as beside:
        try:
            save_file(kept, beside, metadata)
        except SafetensorError as error:  # as which it tells what the disk says
            raise OSError(str(error)) from error


def read(path: Path) -> tuple[dict[str, Tensor], JsonObject]:
    """``(tensors, info)`` as they were given to ``write``, on the CPU.

    Raises StoreError for a missing, foreign, damaged or truncated file, and for one of a newer version.
    """
    return _undisturbed(path, _read)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of any safetensors file, on the CPU; those that ``write`` wrote are checked.

    Raises StoreError for a missing or damaged file.
    """
    tensors, metadata = _undisturbed(path, _opened)
    return read(path)[0] if metadata.get("format") == _FORMAT else tensors


def _undisturbed(path: Path, reading: Callable[[Path], Result]) -> Result:
    """What is read of a file that stays the same meanwhile.

    safetensors opens a file twice, and a running training may replace it in between. It is then an error of ours, or
    torch's own of a file of another size.
    """
    while True:
        before = _identity(path)
        try:
            return reading(path)
        except (StoreError, RuntimeError):
            if _identity(path) == before:
                raise


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def _opened(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 (no dict)
    except FileNotFoundError as error:
        raise StoreError(f"there is no file {path}") from error
    except (OSError, SafetensorError, ValueError) as error:
        raise StoreError(f"{path} is damaged or not a safetensors file ({error}); use an earlier copy") from error


def _read(path: Path) -> tuple[dict[str, Tensor], JsonObject]:
    tensors, metadata = _opened(path)
    if metadata.get("format") != _FORMAT:
        raise StoreError(f"{path} was not written by dynrank-fx, or its header is damaged")
    if metadata.get("version") not in _KNOWN:
        raise StoreError(
            f"{path} has version {metadata.get('version')} and this dynrank-fx reads version {_KNOWN[-1]}; upgrade "
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
