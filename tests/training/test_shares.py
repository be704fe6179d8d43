"""What each of several processes has of the data: together once what one process has, in its order."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, RandomSampler

from dynrank_fx.errors import DynrankError
from dynrank_fx.processes import Processes
from dynrank_fx.randomness import random_state, seed_all
from dynrank_fx.training.shares import OwnShare, SampleShare, Share, share_of


@dataclass(frozen=True)
class Several(Processes):
    """As if there were so many."""

    of: int = 1
    number: int = 0

    @property
    def count(self) -> int:
        return self.of

    @property
    def rank(self) -> int:
        return self.number

    def gathered(self, value: Any) -> list[Any]:
        return [value] * self.of


def shares(data: Any, count: int, **options: Any) -> list[Share]:
    """Of all processes, which draw from one course. data: what each has, or what makes it."""
    seed_all(3)
    each = data if callable(data) else lambda: data
    made = [share_of(each(), "train_data()", Several(of=count, number=rank), **options) for rank in range(count)]
    for share in made:
        share.course = random_state(devices=False) if count > 1 else None
    return made


def passes(data: Any, count: int, start: int = 0, **options: Any) -> list[list[Any]]:
    """A pass of each process, as numbers."""
    made = shares(data, count, **options)
    given = []
    for share in made:
        share.start = start
        given.append([batch.tolist() if isinstance(batch, torch.Tensor) else batch for batch in share])
        assert not share.even or share.length() in (None, len(given[-1]))
    return given


def dealt_by_samples(given: list[list[list[int]]]) -> list[int]:
    """The order of the samples: in every step, the processes take turns."""
    steps = zip(*given, strict=True)
    return [sample for step in steps for turn in zip(*step, strict=True) for sample in turn]


def in_one(loader: Any) -> list[int]:
    """The order of the samples in one process."""
    seed_all(3)
    return [sample for batch in loader for sample in batch.tolist()]


def loader(count: int = 24, **options: Any) -> DataLoader[Any]:
    return DataLoader(range(count), **{"batch_size": 3, "shuffle": True} | options)  # type: ignore[arg-type]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("seeded", [False, True])
def test_samples_are_dealt_in_the_order_of_one_process(seeded: bool, workers: int) -> None:
    def made() -> DataLoader[Any]:
        return loader(generator=torch.Generator().manual_seed(2) if seeded else None, num_workers=workers)

    order = in_one(made())
    for count in (2, 4):
        given = passes(made, count)
        assert all(len(batch) == 3 for batches in given for batch in batches)
        assert dealt_by_samples(given) == order


def test_a_second_pass_has_the_order_of_a_second_one_in_one_process() -> None:
    seed_all(3)
    alone = loader()
    orders = [[sample for batch in alone for sample in batch.tolist()] for _ in range(3)]
    made = shares(loader(), 2)
    for order in orders:
        assert dealt_by_samples([[batch.tolist() for batch in share] for share in made]) == order
    assert orders[0] != orders[1]


def test_what_processes_draw_themselves_is_untouched() -> None:
    (share, _) = shares(loader(), 2)
    before = torch.get_rng_state(), random.getstate()
    list(share)
    assert torch.get_rng_state().equal(before[0])
    assert random.getstate() == before[1]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_pass_is_taken_up_by_others(count: int) -> None:
    """After two steps of two processes, 12 of 24 samples are behind."""
    first, order = passes(loader(), 2), in_one(loader())
    behind = shares(loader(), 2)[0].passed(2)
    assert behind == 12
    rest = passes(loader(), count, behind)
    assert dealt_by_samples([batches[:2] for batches in first]) + dealt_by_samples(rest) == order


def test_uneven_samples_are_dealt_again_or_dropped() -> None:
    assert passes(loader(10, shuffle=False), 2) == [[[0, 2, 4], [6, 8]], [[1, 3, 5], [7, 9]]]
    assert passes(loader(10, shuffle=False), 4) == [[[0, 4, 8]], [[1, 5, 9]], [[2, 6, 0]], [[3, 7, 1]]]
    assert passes(loader(11, shuffle=False, drop_last=True), 3) == [[[0, 3, 6]], [[1, 4, 7]], [[2, 5, 8]]]
    of_torch = [[*DistributedSampler(range(10), 4, rank, shuffle=False)] for rank in range(4)]  # type: ignore[arg-type]
    assert [batch for (batch,) in passes(loader(10, shuffle=False), 4)] == of_torch
    assert passes(loader(5, shuffle=False), 4, even=False) == [[[0, 4]], [[1]], [[2]], [[3]]]


def test_a_samplers_own_choice_counts() -> None:
    weighted = torch.utils.data.WeightedRandomSampler([1.0] * 8, 12)
    given = passes(DataLoader(range(8), 2, sampler=weighted), 2)  # type: ignore[arg-type]
    seed_all(3)
    assert dealt_by_samples(given) == in_one(DataLoader(range(8), 2, sampler=weighted))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "data",
    [
        [10, 11, 12, 13, 14],
        DataLoader(range(10, 15), batch_size=None),  # type: ignore[arg-type]
        DataLoader(range(10, 15), batch_sampler=[[0], [1], [2], [3], [4]], collate_fn=lambda batch: batch[0]),  # type: ignore[arg-type]
    ],
    ids=["list", "batches of the data set", "batches of a sampler"],
)
def test_batches_are_dealt_in_rounds(data: Any) -> None:
    assert isinstance(share_of(data, "", Several(of=2)), Share)
    assert passes(data, 2) == [[10, 12, 14], [11, 13, 14]]
    assert passes(data, 2, even=False) == [[10, 12, 14], [11, 13]]
    assert passes(data, 2, 2) == [[12, 14], [13, 14]]
    assert passes(data, 1, 2) == [[12, 13, 14]]


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[float]:
        return (random.random() + torch.rand(()).item() for _ in range(6))


def test_a_stream_is_the_same_in_all_processes_whatever_else_they_draw() -> None:
    seed_all(3)
    order = [batch.tolist() for batch in DataLoader(Stream(), 1)]
    given = []
    for share in shares(DataLoader(Stream(), 1), 2):
        given.append([])
        for batch in share:
            given[-1].append(batch.tolist())
            torch.rand(share.processes.rank + 1)
    assert [given[i % 2][i // 2] for i in range(6)] == order
    assert share.length() is None


def test_data_that_are_sharded_already_stay_as_they_are() -> None:
    assert passes([1, 2, 3], 2, own=True) == [[1, 2, 3]] * 2
    samplers = [DistributedSampler(range(8), 2, rank, seed=1) for rank in range(2)]  # type: ignore[arg-type]
    for batches in (False, True):
        made = []
        for sampler in samplers:
            how: dict[str, Any] = {"batch_size": 2, "sampler": sampler}
            if batches:
                how = {"batch_sampler": BatchSampler(sampler, 2, False)}
            share = share_of(DataLoader(range(8), **how), "", Several(of=2))  # type: ignore[arg-type]
            assert isinstance(share, OwnShare)
            share.passes = 5
            made.append([batch.tolist() for batch in share])
        for sampler in samplers:
            sampler.set_epoch(5)
        assert [[each for batch in batches for each in batch] for batches in made] == [[*each] for each in samplers]
    share.start = 4
    assert len(list(share)) == share.length() == 0 or share.length() == 2


def test_the_epoch_is_told_in_one_process_too() -> None:
    sampler = DistributedSampler(range(8), 1, 0)  # type: ignore[arg-type]
    share = share_of(DataLoader(range(8), 8, sampler=sampler), "")  # type: ignore[arg-type]
    share.passes = 2
    (batch,) = share
    sampler.set_epoch(2)
    assert batch.tolist() == [*sampler]


def test_one_process_has_the_data_themselves() -> None:
    data = loader(sampler=RandomSampler(range(24)), shuffle=None)
    share = share_of(data, "")
    assert isinstance(share, SampleShare)
    seed_all(3)
    assert [batch.tolist() for batch in share] == passes(data, 1)[0]
    assert share.length() == len(data)


def test_less_data_than_processes_are_refused() -> None:
    with pytest.raises(
        DynrankError,
        match=r"^train_data\(\) has fewer samples \(3\) than there are processes to share them \(4\): start no more",
    ):
        shares(loader(3), 4)
    with pytest.raises(DynrankError, match=r"^train_data\(\) has fewer batches \(1\) than there are processes"):
        shares([1], 2)


def test_other_steps_than_before_are_said() -> None:
    (share,) = shares(DataLoader(list(range(40)), 8), 1)
    assert share.other_than(None) is share.other_than("1 x 8 samples") is share.other_than("4 x 2 samples") is None
    said = share.other_than("2 x 8 samples")
    assert said is not None
    before, now = (
        "so far a step was of 16 samples (2 processes x 8)",
        "from here on it is of 8 (1 process x 8): of fewer",
    )
    assert said.startswith(f"{before}, and {now}, so that a pass over the data has more steps")
    assert said.endswith("start 2 processes, or give batches 2 times as large")
    two = str(shares([1, 2, 3], 2)[0].other_than("1 x 1 batches"))
    assert two.startswith("so far a step was of 1 batch (1 process x 1), and from here on it is of 2 (2 processes x 1)")
    assert two.endswith("to train as before, start 1 process")
