"""The processes that train one net together, as torch.distributed has started them.

Everything here is called by all of them, in the same order. Any of them may fail: ``all_or_none`` and ``from_one`` see
to it that then all raise, instead of waiting for one that is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import DynrankError, first_line

T = TypeVar("T")


@dataclass(frozen=True)
class _Stands:
    """In the place of a tensor that is sent apart."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    stride: tuple[int, ...]
    device: str


@dataclass(frozen=True)
class Processes:
    """The processes that train one net together; one alone where there is no group.

    Attributes:
        group: Those of torch.distributed; None for a process of its own.
    """

    group: dist.ProcessGroup | None = None

    @property
    def count(self) -> int:
        """How many they are."""
        return 1 if self.group is None else self.group.size()

    @property
    def rank(self) -> int:
        """The number of this one among them, from 0."""
        return 0 if self.group is None else self.group.rank()

    @property
    def first(self) -> bool:
        """Whether this one writes files and prints."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """Where tensors have to be that the group's backend sends."""
        if self.group is None:
            return torch.device("cpu")
        kinds = {device.type for device in self.group._device_types}
        return (
            torch.device("cpu")
            if "cpu" in kinds
            else torch.device(kinds.pop(), torch.accelerator.current_device_index())
        )

    def wait(self) -> None:
        """Until all have come here."""
        self.sum_([torch.zeros(1)])

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Add up each tensor over the processes, in place; one message for all of one dtype and device."""
        if self.count == 1:
            return
        kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for tensor in tensors:
            kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
        for several in kinds.values():
            flat = torch.cat([each.reshape(-1) for each in several]).to(self._there(several[0]))
            dist.all_reduce(flat, group=self.group)
            for each, part in zip(several, flat.split([each.numel() for each in several]), strict=True):
                each.copy_(part.view(each.shape))

    def gathered(self, value: T) -> list[T]:
        """What each gives, by rank: plain values, small ones."""
        if self.group is None or self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count  # Any: the list that torch fills
        with self._waiting(DynrankError):
            dist.all_gather_object(values, value, group=self.group)
        return values

    @contextmanager
    def all_or_none(self, error: type[DynrankError], what: str) -> Iterator[None]:
        """Where the block fails in one process, it fails in all: the others raise such an error, which says what failed
        and why. No block holds communication that a failure before it would leave half done.
        """
        failure: BaseException | None = None
        try:
            yield
        except BaseException as caught:
            failure = caught
            raise
        finally:
            if self.count > 1:
                self._tell(failure, error, what)

    @contextmanager
    def _waiting(self, error: type[DynrankError]) -> Iterator[None]:
        """Words for others that do not come within the time that the group was given, or are gone."""
        try:
            yield
        except RuntimeError as failed:
            raise error(
                f"process {self.rank} of {self.count} waited in vain for the others ({first_line(failed)}): look for "
                "the first error among them, and give every process as many batches (DistributedSampler with "
                "drop_last=True), since one that makes fewer steps ends, or comes to a switch, before the others"
            ) from failed

    def _tell(self, failure: BaseException | None, error: type[DynrankError], what: str) -> None:
        failed = torch.tensor([0 if failure is None else 1], device=self.device)
        with self._waiting(error):
            dist.all_reduce(failed, group=self.group)
        if not int(failed):
            return
        said = self.gathered(None if failure is None else _said(failure))
        if failure is None:
            rank, sentence = next((i, each) for i, each in enumerate(said) if each is not None)
            raise error(f"{what} failed in process {rank} of {self.count}, and nothing was done in any: {sentence}")

    def from_one(self, source: int, make: Callable[[], T], error: type[DynrankError], what: str) -> T:
        """What ``make`` gives in the process of this rank, in all of them: tensors in plain containers, bit by bit.

        Only there ``make`` is called. It may raise, and then all do.
        """
        if self.count == 1:
            return make()
        made: list[Tensor] = []
        sent: list[Any] = [None, None]  # Any: the list that torch fills. The value without its tensors, or what failed
        failure: BaseException | None = None
        if self.rank == source:
            try:
                leaves, spec = pytree.tree_flatten(make())
                made = [each.detach() for each in leaves if isinstance(each, Tensor)]
                sent[0] = pytree.tree_unflatten([_stands(e) if isinstance(e, Tensor) else e for e in leaves], spec)
            except BaseException as caught:
                failure, sent[1] = caught, _said(caught)
        dist.broadcast_object_list(sent, group_src=source, group=self.group, device=self.device)
        if failure is not None:
            raise failure
        if sent[1] is not None:
            raise error(f"{what} failed in process {source} of {self.count}, and nothing was done in any: {sent[1]}")
        leaves, spec = pytree.tree_flatten(sent[0])
        tensors = made if self.rank == source else [_empty(each) for each in leaves if isinstance(each, _Stands)]
        self._send(tensors, source)
        there = iter(tensors)
        value: T = pytree.tree_unflatten([next(there) if isinstance(e, _Stands) else e for e in leaves], spec)
        return value

    def _send(self, tensors: list[Tensor], source: int) -> None:
        """Fill these tensors, everywhere, with those of the source; one message for all of one dtype and device."""
        kinds: dict[tuple[torch.dtype, str], list[Tensor]] = {}
        for tensor in tensors:
            kinds.setdefault((tensor.dtype, tensor.device.type), []).append(tensor)
        for several in kinds.values():
            flat = torch.cat([each.reshape(-1) for each in several]).to(self._there(several[0]))
            dist.broadcast(flat, group_src=source, group=self.group)
            if self.rank != source:
                for each, part in zip(several, flat.split([each.numel() for each in several]), strict=True):
                    each.copy_(part.view(each.shape))

    def _there(self, tensor: Tensor) -> torch.device:
        """Where this tensor is sent from: where it is, if the backend takes it there."""
        assert self.group is not None
        return tensor.device if tensor.device in self.group._device_types else self.device


ALONE = Processes()
"""A process of its own."""


def started() -> Processes:
    """All processes that torch.distributed has started here; ``ALONE`` where it has not."""
    if not (dist.is_available() and dist.is_initialized()):
        return ALONE
    return Processes(dist.group.WORLD)


def _stands(tensor: Tensor) -> _Stands:
    return _Stands(tuple(tensor.shape), tensor.dtype, _dense_strides(tensor), tensor.device.type)


def _empty(like: _Stands) -> Tensor:
    """Room for a tensor of the source, on the same kind of device and with the same strides."""
    kind = torch.device(like.device)
    here = kind if kind.type == "cpu" else torch.device(kind.type, torch.accelerator.current_device_index())
    return torch.empty_strided(like.shape, like.stride, dtype=like.dtype, device=here)


def _dense_strides(tensor: Tensor) -> tuple[int, ...]:
    """Its strides, where they leave no gaps; as ``empty_like`` has them."""
    return tuple(torch.empty_like(tensor, device="meta").stride())


def _said(error: BaseException) -> str:
    return str(error) if isinstance(error, DynrankError) else first_line(error)
