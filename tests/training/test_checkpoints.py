"""Checkpoints of a loop of one's own: training goes on from them as if it had not been stopped, by any processes."""

from __future__ import annotations

import itertools
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpointing import STEPS, Numbered, Training, broken, ddp, sharded, unequal
from several import in_processes, until_one_ends

import dynrank_fx as dr
from dynrank_fx import files
from dynrank_fx.training import Run, save_run


@pytest.mark.parametrize("stop", [0, 3, 4, 9, 13])
def test_training_goes_on_bit_by_bit_wherever_it_stopped(stop: int, tmp_path: Path) -> None:
    expected, first, again = (Training(whole=True) for _ in range(3))
    losses = expected.train(range(STEPS))
    torch.manual_seed(100)
    before = first.train(range(stop))
    first.save(tmp_path / "saved", step=stop, mine=torch.arange(3))
    again.train(range(2))  # it has gone elsewhere
    extra = again.load(tmp_path / "saved")
    assert (extra["step"], extra["mine"].tolist()) == (stop, [0, 1, 2])
    said = repr(dr.load_checkpoint_(tmp_path / "saved", again.net))
    assert said == f"Loaded(phases=<state after {len(first.phases.history)} records>, extra=<step, mine>)"
    assert dr.phases_of(again.net) == dr.phases_of(first.net)
    assert before + again.train(range(stop, STEPS)) == losses
    assert unequal(again.state(), expected.state()) == []


def differing(one: Training, other: Training, most: float) -> list[str]:
    """The names of what is not the same; of averages of batches, each process has its own where it has a shard."""
    return [name for name in unequal(one.state(), other.state(), most) if "running" not in name]


def across(rank: int, folder: Path, count: int) -> dict[str, Any]:
    found = {}
    told = Training(rank, count, ddp)  # a checkpoint of one process
    told.load(folder / "one")
    told.train(range(7, 9))
    found["from one"] = told.state()

    told.save(folder / "several", step=9)
    told.train(range(9, 11))
    found["two more"] = told.state()

    into = Training(rank, count, sharded)  # of DDP into FSDP2, and back
    into.load(folder / "several")
    into.train(range(9, 11))
    found["sharded"] = into.state()
    into.save(folder / "sharded", step=11)
    into.train(range(11, 13))
    told.load(folder / "sharded")
    told.train(range(11, 13))
    found["back"] = unequal(told.state(), into.state(), 1e-6)
    found["later"] = into.state()

    for way in (ddp, sharded):  # a run of one process till now
        told = Training(rank, count, way)
        dr.load_checkpoint_(folder / "run", told.net, told.optimizer)
        found[f"{way.__name__} of a run"] = told.state()

    for way in (ddp, sharded):
        first, again = (Training(rank, count, way, whole=True) for _ in range(2))
        first.train(range(6))
        first.save(folder / "whole")
        first.train(range(6, 10))
        again.load(folder / "whole")
        again.train(range(6, 10))
        # Of more than two processes DDP adds up in an order that its buckets have, which are others after a start.
        found[f"{way.__name__} again"] = differing(again, first, 1e-6 if way is ddp and count > 2 else 0)

    found["refusals"] = []
    file = folder / "whole" / f"__{count - 1}_0.distcp"
    before = again.state()
    if rank == 0:
        broken(file)
    with pytest.raises(dr.StoreError) as caught:
        again.load(folder / "whole")
    found["refusals"].append(str(caught.value))
    found["untouched"] = unequal(again.state(), before)
    with pytest.raises(dr.StoreError) as caught:  # something in one process cannot be kept
        again.save(folder / "several", mine=object() if rank == 0 else 3)
    found["refusals"].append(str(caught.value))
    return found


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.fuzz)])
def test_any_number_of_processes_goes_on(tmp_path: Path, count: int) -> None:
    one = Training()
    one.train(range(7))
    one.save(tmp_path / "one", step=7)
    one.train(range(7, 9))
    run = Run(one.net, one.optimizer, one.phases.schedule)
    (tmp_path / "run").mkdir()
    save_run(run, tmp_path / "run")
    results = in_processes(across, tmp_path, count, count=count, seconds=120 * (count - 1))
    assert unequal(results[0]["from one"], one.state(), 1e-6) == []
    again = Training()
    assert again.load(tmp_path / "several") == {"step": 9}
    again.train(range(9, 11))
    later = Training()
    assert later.load(tmp_path / "sharded") == {"step": 11}
    later.train(range(11, 13))
    for found in results:
        assert unequal(found["sharded"], found["two more"], 1e-6) == []
        assert unequal(found["later"], later.state(), 1e-6) == []
        assert found["back"] == []
        assert unequal(found["from one"], results[0]["from one"]) == []
        assert unequal(again.state(), found["two more"], 1e-6) == []
        assert (found["ddp again"], found["sharded again"]) == ([], [])
        assert found["untouched"] == []
        for way in (ddp, sharded):
            assert unequal(found[f"{way.__name__} of a run"], one.state()) == []
        damaged, kept = found["refusals"]
        assert f"__{count - 1}_0.distcp is damaged, or of another checkpoint" in damaged
        assert "mine is a object" in kept
    assert not list(tmp_path.glob(".*"))


def test_a_net_that_has_diverged_goes_back_to_its_checkpoint(tmp_path: Path) -> None:
    training = Training()
    training.train(range(3))
    training.save(tmp_path / "saved")
    training.train(range(3, 6))
    expected = training.state()
    with torch.no_grad():
        for p in training.net.parameters():
            p.fill_(torch.nan)
    training.load(tmp_path / "saved")
    training.train(range(3, 6))
    assert unequal(training.state(), expected) == []


def counted(then: Callable[[int], None]) -> None:
    """From now on this process tells at every call of the disk which it is."""
    calls = 0

    def watched(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            then(calls)
            return real(*args, **options)

        return call

    for name in ("rename", "replace", "fsync", "mkdir", "unlink"):
        setattr(os, name, watched(getattr(os, name)))
    files._exchanged = watched(files._exchanged)


def dies_at(number: int) -> Callable[[int], None]:
    return lambda calls: os._exit(9) if calls == number else None


@pytest.mark.filterwarnings("ignore:This process")  # a fork beside torch's threads, which it does not use
@pytest.mark.parametrize("stride", [4, pytest.param(1, marks=pytest.mark.fuzz)])
def test_a_kill_at_any_moment_leaves_the_last_or_the_next(tmp_path: Path, stride: int) -> None:
    training, folder = Numbered(), tmp_path / "saved"
    for number in itertools.count(1, stride):
        training.save(folder, 1)
        assert [path.name for path in tmp_path.iterdir()] == ["saved"]  # what was left over is gone
        child = os.fork()
        if child == 0:
            counted(dies_at(number))
            training.save(folder, 2)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert training.load(folder) in ((1, 2) if code else (2,))
        if code == 0:
            break
        assert code == 9
    assert number > 8


def one_dies(rank: int, folder: Path) -> None:
    training = Numbered(ddp)
    training.save(folder / "saved", 1)
    if rank == 1:
        counted(dies_at(1))
    try:
        training.save(folder / "saved", 2)
    except dr.StoreError as error:
        (folder / "said").write_text(str(error))


def test_a_kill_of_another_process_leaves_the_last(tmp_path: Path) -> None:
    codes = until_one_ends(one_dies, tmp_path, kill=lambda ids: None)
    assert codes[1] == 9
    assert "first error among the others" in (tmp_path / "said").read_text()
    training = Numbered()
    assert training.load(tmp_path / "saved") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["said", "saved"]
    training.save(tmp_path / "saved", 3)
    assert training.load(tmp_path / "saved") == 3


def saves_on_and_on(rank: int, folder: Path) -> None:
    training = Numbered(ddp)
    number = training.load(folder / "saved") if (folder / "saved").exists() else 0
    (folder / f"begun{rank}").touch()
    while True:
        number += 1
        training.save(folder / "saved", number)


@pytest.mark.fuzz
@pytest.mark.parametrize("seed", range(30))
def test_kills_at_random_moments_while_two_processes_save(tmp_path: Path, seed: int) -> None:
    """Of one or of both; and again, by processes that go on from what is there."""
    chance = random.Random(seed)
    last, training = 0, Numbered()
    for _ in range(2):

        def kill(ids: list[int]) -> None:
            end = time.monotonic() + 60
            while len(list(tmp_path.glob("begun*"))) < 2:
                assert time.monotonic() < end
                time.sleep(0.01)
            time.sleep(chance.uniform(0, 1))
            for each in chance.choice(([0], [1], [0, 1])):
                os.kill(ids[each], signal.SIGKILL)

        until_one_ends(saves_on_and_on, tmp_path, kill=kill)
        for file in tmp_path.glob("begun*"):
            file.unlink()
        if (tmp_path / "saved").exists() or last:
            number = training.load(tmp_path / "saved")
            assert number >= last
            last = number
    training.save(tmp_path / "saved", last + 1)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
