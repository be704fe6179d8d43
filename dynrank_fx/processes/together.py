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
            with self._waiting(DynrankError):
                dist.all_reduce(flat, group=self.group)
            for each, part in zip(several, flat.split([each.numel() for each in several]), strict=True):
                each.copy_(part.view(each.shape))

    def most(self, number: int) -> int:
        """The largest of the numbers that each gives: of flags, whether any is set."""
        if self.count == 1:
            return int(number)
        largest = torch.tensor([int(number)], device=self.device)
        with self._waiting(DynrankError):
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        return int(largest)

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
        """Where the block fails in one process, it fails in all: the others raise an error of the same kind (such an
        error, for what is none of ours), which says what failed and why. Communication within the block goes by
        ``heard``, or a failure before it would leave it half done.
        """
        failure: BaseException | None = None
        try:
            yield
        except BaseException as caught:
            failure = caught
            raise
        finally:
            told = failure is not None and vars(failure).pop(_HEARD, False)
            if self.count > 1 and not told:
                self._tell(failure, error, what)

    def heard(self, error: type[DynrankError], what: str) -> Heard:
        """These processes within a block of ``all_or_none`` that was given the same."""
        return Heard(self.group, error, what)

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
            rank, (kind, sentence) = next((i, each) for i, each in enumerate(said) if each is not None)
            raise (kind or error)(self._failed(what, rank, sentence))

    def _failed(self, what: str, rank: int, sentence: str) -> str:
        return f"{what} failed in process {rank} of {self.count}, and nothing was done in any: {sentence}"

    def from_one(self, source: int, make: Callable[[], T], error: type[DynrankError], what: str) -> T:
        """What ``make`` gives in the process of this rank, in all of them: tensors in plain containers, bit by bit.

        Only there ``make`` is called. It may raise, and then all do, as in ``all_or_none``.
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
        with self._waiting(error):
            dist.broadcast_object_list(sent, group_src=source, group=self.group, device=self.device)
        if failure is not None:
            raise failure
        if sent[1] is not None:
            kind, sentence = sent[1]
            raise (kind or error)(self._failed(what, source, sentence))
        leaves, spec = pytree.tree_flatten(sent[0])
        tensors = made if self.rank == source else [_empty(each) for each in leaves if isinstance(each, _Stands)]
        self._send(tensors, source, error)
        there = iter(tensors)
        value: T = pytree.tree_unflatten([next(there) if isinstance(e, _Stands) else e for e in leaves], spec)
        return value

    def _send(self, tensors: list[Tensor], source: int, error: type[DynrankError]) -> None:
        """Fill these tensors, everywhere, with those of the source; one message for all of one dtype and device."""
        kinds: dict[tuple[torch.dtype, str], list[Tensor]] = {}
        for tensor in tensors:
            kinds.setdefault((tensor.dtype, tensor.device.type), []).append(tensor)
        for several in kinds.values():
            flat = torch.cat([each.reshape(-1) for each in several]).to(self._there(several[0]))
            with self._waiting(error):  # backends do not know every dtype, and all of them know bytes
                dist.broadcast(flat.view(torch.uint8), group_src=source, group=self.group)
            if self.rank != source:
                for each, part in zip(several, flat.split([each.numel() for each in several]), strict=True):
                    each.copy_(part.view(each.shape))

    def _there(self, tensor: Tensor) -> torch.device:
        """Where this tensor is sent from: where it is, if the backend takes it there."""
        assert self.group is not None
        return tensor.device if tensor.device in self.group._device_types else self.device


@dataclass(frozen=True)
class Heard(Processes):
    """Processes within a block of ``all_or_none`` that communicate there: before each message they hear whether the
    block has failed in one of them, which then sends no more, and all raise as at the block's end.

    Attributes:
        error: What the block was given.
        what: What the block was given.
    """

    error: type[DynrankError] = DynrankError
    what: str = ""

    def hear(self) -> None:
        """Raises where the block of another has failed."""
        if self.count == 1:
            return
        try:
            Processes(self.group)._tell(None, self.error, self.what)
        except DynrankError as failed:
            setattr(failed, _HEARD, True)  # the others know already
            raise

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        self.hear()
        super().sum_(tensors)

    def most(self, number: int) -> int:
        self.hear()
        return super().most(number)

    def gathered(self, value: T) -> list[T]:
        self.hear()
        return super().gathered(value)

    def from_one(self, source: int, make: Callable[[], T], error: type[DynrankError], what: str) -> T:
        self.hear()
        return super().from_one(source, make, error, what)


_HEARD = "_dynrank_heard"  # of an error that all know of, so that the end of its block need not tell it

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


def _said(error: BaseException) -> tuple[type[DynrankError] | None, str]:
    """An error as it is told to the others: its kind, where it is one of ours, and its sentence."""
    return (type(error), str(error)) if isinstance(error, DynrankError) else (None, first_line(error))
