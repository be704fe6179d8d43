"""What each of several processes has of the data: one order for all of them, dealt out like cards.

The order of a pass over the data does not depend on how many processes there are: it is that of one process, and after
any step a beginning of it is done, each entry once. So a pass that was left midway can be taken up by more processes or
by fewer. The entries are samples where a ``DataLoader`` makes batches of single samples, and batches of any other data.
"""

from __future__ import annotations

import itertools
import re
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, TypeGuard

import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, Sampler

from ..aliases import Batch, StateDict
from ..errors import DynrankError
from ..processes import ALONE, Processes
from ..randomness import drawing, random_state
from ..text import counted


class Share:
    """The batches of one of the processes, of data that are batches: each takes its own of every round of them.

    Every process goes through all of the data. A last round that is not whole is dealt again from its own beginning, so
    that all have equally many; of ``even=False`` nothing is dealt twice.

    Args:
        data: The user's data, which each process has as a whole.
        processes: Those that share them.
        even: Whether all processes have equally many batches.

    Attributes:
        start: How many entries of the order are behind when a pass begins, since it was left and is taken up again.
        passes: The passes before this one, of which a sampler is told (``set_epoch``).
        course: The random numbers that the order is drawn by, the same in all processes; see ``randomness.drawing``.
            None in one process, and where only what rank 0 would draw now counts.
    """

    size = 1
    """Entries of a batch."""
    one, unit = "batch", "batches"
    """What the entries are."""

    def __init__(self, data: Iterable[Batch], processes: Processes = ALONE, *, even: bool = True) -> None:
        self.data, self.processes, self.even = data, processes, even
        self.start = self.passes = 0
        self.course: StateDict | None = None

    @property
    def entries(self) -> int | None:
        """Of the whole order; None where the data do not say."""
        try:
            return len(self.data) or None  # type: ignore[arg-type]
        except (TypeError, ValueError):  # of one below zero
            return None

    @property
    def dealt(self) -> str:
        """What has to be the same where a pass is taken up as if it had never been left."""
        return f"{self.processes.count} x {self.size} {self.unit}"

    def other_than(self, dealt: str | None) -> str | None:
        """A sentence where a run goes on with other steps than before; None where they take as much of the data.

        dealt: as it was then; None where there is nothing to go on with.
        """
        count, size = map(int, re.findall(r"\d+", dealt or self.dealt))
        before, now = count * size, self.processes.count * self.size
        if before == now:
            return None
        of, has = ("fewer", "more") if now < before else ("more", "fewer")
        then, here = ("process" if each == 1 else "processes" for each in (count, self.processes.count))
        return (
            f"so far a step was of {counted(before, self.one, self.unit)} ({count} {then} x {size}), and from here on "
            f"it is of {now} ({self.processes.count} {here} x {self.size}): of {of}, so that a pass over the data has "
            f"{has} steps, and the learning rate was chosen for the others; to train as before, start {count} {then}"
            + (f", or give batches {before / now:.3g} times as large" if before > now else "")
        )

    def passed(self, batches: int) -> int:
        """The entries that are behind when every process has had so many batches of this pass."""
        return self.start + batches * self.size * self.processes.count

    def length(self, start: int | None = None) -> int | None:
        """The batches of each process, where so many entries are behind, by default those of this pass; the most that
        one has, of uneven ones. None where the data do not say.
        """
        entries = self.entries
        return None if entries is None else self._length(max(0, entries - (self.start if start is None else start)))

    def __iter__(self) -> Iterator[Batch]:
        for sampler in _samplers(self.data):
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(self.passes)
        if self.processes.count == 1 and self.start == 0:
            return iter(self.data)
        return self._batches()

    def _length(self, entries: int) -> int:
        return _parts(entries, self.processes.count)

    def _batches(self) -> Iterator[Batch]:
        course = self._course()
        with drawing(course):
            batches = iter(self.data)
            next(itertools.islice(batches, self.start, self.start), None)
        return self._rounds(batches, course)

    def _rounds(self, batches: Iterator[Batch], course: StateDict | None) -> Iterator[Batch]:
        count = self.processes.count
        while True:
            with drawing(course):
                dealt = list(itertools.islice(batches, count))
            if self.processes.rank < len(dealt) or (dealt and self.even):
                yield dealt[self.processes.rank % len(dealt)]
            if len(dealt) < count:
                return

    def _course(self) -> StateDict | None:
        if self.course is not None or self.processes.count == 1:
            return self.course
        return self.processes.from_one(0, lambda: random_state(devices=False), DynrankError, "drawing the order")


class SampleShare(Share):
    """Of a ``DataLoader`` that makes batches of single samples: each process has its own samples, in batches of the
    loader's size.

    The first samples are dealt once more at the end, until all have equally many, as ``DistributedSampler`` does it;
    where the loader drops its last batch, the last ones are dropped instead.
    """

    data: DataLoader[Any]  # Any: the user's samples
    one, unit = "sample", "samples"

    # Any: the user's samples
    def __init__(self, data: DataLoader[Any], processes: Processes = ALONE, *, even: bool = True) -> None:
        super().__init__(data, processes, even=even)
        assert data.batch_size is not None
        self.size = data.batch_size
        self._own = _Own()
        self._loader: DataLoader[Any] | None = None  # Any: as above

    @property
    def entries(self) -> int | None:
        try:
            return len(self.data.sampler) or None  # type: ignore[arg-type]
        except (TypeError, ValueError):  # of one below zero
            return None

    def _length(self, entries: int) -> int:
        count, drop = self.processes.count, self.data.drop_last
        samples = entries // count if drop else _parts(entries, count)
        return samples // self.size if drop else _parts(samples, self.size)

    def _batches(self) -> Iterator[Batch]:
        course = self._course()
        generator = torch.Generator().manual_seed(_seed_of(course) + self.processes.rank)
        with drawing(course):
            # What a loader draws first, for its workers: so the order is that of one process.
            torch.empty((), dtype=torch.int64).random_(generator=self.data.generator)
            order = list(self.data.sampler)[self.start :]
        self._own.samples = self._mine(order)
        if self._loader is None:  # made once, since its workers may be persistent
            self._loader = _like(self.data, self._own, generator)
        assert self._loader.generator is not None
        self._loader.generator.set_state(generator.get_state())
        return iter(self._loader)

    def _mine(self, order: list[Any]) -> list[Any]:  # Any: what the data set is indexed by
        count = self.processes.count
        if self.even and self.data.drop_last:
            order = order[: len(order) // count * count]
        elif self.even and order:
            order = [*order, *itertools.islice(itertools.cycle(order), -len(order) % count)]
        return order[self.processes.rank :: count]


class OwnShare(Share):
    """Of data that give each process a share of its own: as they are. A pass ends for all when it ends for one."""

    def __init__(self, data: Iterable[Batch], processes: Processes = ALONE, *, even: bool = True) -> None:
        super().__init__(data, processes, even=even)
        lengths = processes.gathered(super().entries)
        known = [each for each in lengths if each is not None]
        self._least = min(known) * processes.count if len(known) == len(lengths) else None

    @property
    def entries(self) -> int | None:
        return self._least

    def _length(self, entries: int) -> int:
        return entries // self.processes.count

    def _batches(self) -> Iterator[Batch]:
        return itertools.islice(self.data, self.start // self.processes.count, None)


def share_of(
    data: Iterable[Batch],
    name: str,
    processes: Processes = ALONE,
    *,
    own: bool = False,
    even: bool = True,
) -> Share:
    """The share that this process has of the user's data.

    name: what the user calls them. own: whether they give each process a share of its own; those of a loader with a
    ``DistributedSampler`` do. even: whether all processes have equally many batches. Raises DynrankError where there is
    less than one entry for each process.
    """
    if own or any(hasattr(each, "num_replicas") for each in _samplers(data)):
        return OwnShare(data, processes, even=even)
    share = SampleShare(data, processes, even=even) if _is_of_samples(data) else Share(data, processes, even=even)
    entries = share.entries
    if even and entries is not None and entries < processes.count:
        raise DynrankError(
            f"{name} has fewer {share.unit} ({entries}) than there are processes to share them ({processes.count}): "
            f"start no more processes than there are {share.unit}"
        )
    return share


class _Own(Sampler[Any]):  # Any: what the data set is indexed by
    """The samples of this process, in this pass."""

    def __init__(self) -> None:
        self.samples: list[Any] = []  # Any: as above

    def __iter__(self) -> Iterator[Any]:  # Any: as above
        return iter(self.samples)

    def __len__(self) -> int:
        return len(self.samples)


def _samplers(data: object) -> list[object]:
    """What chooses the samples of a loader."""
    batches = getattr(data, "batch_sampler", None)
    held = (getattr(data, "sampler", None), batches, getattr(batches, "sampler", None))
    return [each for i, each in enumerate(held) if each is not None and all(each is not other for other in held[:i])]


def _is_of_samples(data: object) -> TypeGuard[DataLoader[Any]]:  # Any: the user's samples
    """Whether it is torch's own loader of a map-style data set, of which the sampler alone says what is in a batch."""
    if type(data) is not DataLoader or isinstance(data.dataset, IterableDataset):
        return False
    return type(data.batch_sampler) is BatchSampler


# Any: the user's samples, and what the data set is indexed by
def _like(loader: DataLoader[Any], sampler: Sampler[Any], generator: torch.Generator) -> DataLoader[Any]:
    """The loader with another sampler."""
    return DataLoader(
        loader.dataset,
        batch_size=loader.batch_size,
        sampler=sampler,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        drop_last=loader.drop_last,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=generator,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
        in_order=loader.in_order,
    )


def _seed_of(course: StateDict | None) -> int:
    """A seed for what each process draws by itself, which no number is drawn for."""
    state = torch.get_rng_state() if course is None else course["torch"]
    return zlib.crc32(state.numpy().tobytes())


def _parts(count: int, size: int) -> int:
    """How many parts of this size it takes."""
    return -(-count // size)
