"""Tensors on disk to which every process writes its part, by ``torch.distributed.checkpoint``: each lies there once,
whoever holds it or a shard of it, and is read in other shards by any number of processes.

Every file has a digest, and nothing in a file is run.
"""

from __future__ import annotations

import hashlib
import pickle
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from ..errors import StoreError, first_line
from ..files import why
from ..processes import Processes, is_part, part_as

_METADATA = ".metadata"  # of torch: which tensor lies where
_SHARDS = "__*_*.distcp"


def names_of_shards(folder: Path) -> set[str]:
    """The files in a folder that ``write_shards`` may have written."""
    return {_METADATA, *(path.name for path in folder.glob(_SHARDS))}


def write_shards(folder: Path, tensors: Mapping[str, Tensor], processes: Processes) -> dict[str, str]:
    """Write what each process gives into a folder that all of them see; the digest of every file, by name.

    What several give under one name is taken from one of them; of a DTensor, each gives its shard. Raises StoreError in
    all where it fails in one.
    """
    with _in_words("saving", processes):
        save(
            dict(tensors),
            storage_writer=FileSystemWriter(folder),
            process_group=processes.group,
            no_dist=processes.group is None,
        )
    names = processes.from_one(0, lambda: sorted(names_of_shards(folder)), StoreError, "saving")
    own = {}
    with processes.all_or_none(StoreError, "saving"):
        for name in _part(names, processes):
            own[name] = _digest(folder / name)
    return {name: digest for digests in processes.gathered(own) for name, digest in digests.items()}


def check_shards(folder: Path, digests: Mapping[str, str], processes: Processes) -> None:
    """Raises StoreError in all processes where a file is not as it was written. Each reads some of the files."""
    with processes.all_or_none(StoreError, "loading"):
        for name in _part(sorted(digests), processes):
            if _digest(folder / name) != digests[name]:
                raise StoreError(
                    f"{folder / name} is damaged, or of another checkpoint: put back the file that belongs to this "
                    "one, or load an earlier checkpoint"
                )


def read_shards_(folder: Path, tensors: Mapping[str, Tensor], processes: Processes) -> None:
    """Fill these tensors, by name: plain ones, and each process's shards of DTensors.

    The files have been checked. Raises StoreError in all processes where it fails in one.
    """
    with _in_words("loading", processes):
        load(
            dict(tensors),
            storage_reader=_Reader(folder),
            process_group=processes.group,
            no_dist=processes.group is None,
        )


@torch.no_grad()
def copy_whole_(tensor: Tensor, whole: Tensor) -> None:
    """Fill a tensor, or each process's shard of it, from a whole one that all processes have."""
    tensor.copy_(part_as(whole, tensor) if is_part(tensor) else whole)


class _Reader(FileSystemReader):
    """torch's, which runs nothing that stands in a file."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:  # Any: as torch has it
        with open(Path(self.path) / _METADATA, "rb") as file:
            metadata: Metadata = _Plain(file).load()
        return metadata


class _Plain(pickle.Unpickler):
    """Values of torch's own descriptions of tensors, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:  # Any: as pickle has it
        described = module in ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
        plain = module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype))
        path = module.split(".")[0] == "pathlib" and name.endswith("Path")
        if not (described or plain or path or (module, name) == ("torch.serialization", "_get_layout")):
            raise pickle.UnpicklingError(f"it holds {module}.{name}, which is none of torch's descriptions of tensors")
        return super().find_class(module, name)


@contextmanager
def _in_words(what: str, processes: Processes) -> Iterator[None]:
    """What torch raises in all processes where one fails, as one sentence."""
    try:
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # that it is one process
            yield
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        if not isinstance(cause, Exception):  # an interruption
            raise cause from None
        place = f" in process {rank} of {processes.count}" if processes.count > 1 else ""
        said = why(cause) if isinstance(cause, OSError) else first_line(cause)
        raise StoreError(f"{what} failed{place}: {said}") from error
    except RuntimeError as error:  # of the messages between them; what else fails comes as the one above
        raise StoreError(
            f"{what} failed, since another process is gone or does not answer ({first_line(error)}): look for the "
            "first error among the others"
        ) from error


def _part(names: list[str], processes: Processes) -> list[str]:
    """This process's part of the files."""
    return names[processes.rank :: processes.count]


def _digest(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError as error:
        raise StoreError(f"{path} is missing: put it back, or load an earlier checkpoint") from error
    except OSError as error:
        raise StoreError(f"{path} could not be read ({why(error)}): load an earlier checkpoint") from error
