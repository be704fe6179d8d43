"""The history of a run grows in its file, and a checkpoint takes of it what is its own and nothing else."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dynrank_fx as dr
from dynrank_fx import store
from dynrank_fx.schedules import EpochRecord
from dynrank_fx.training import CHECKPOINT, Run, read_run, restore_run_, save_run

HISTORY = "history.jsonl"


def run_of(epochs: int) -> Run:
    net = dr.transform(nn.Sequential(nn.Linear(16, 16)), (torch.zeros(2, 16),), rank=dr.Fixed(4))
    run = Run(net, torch.optim.SGD(net.parameters(), lr=0.1), dr.schedules.always(dr.Phase.FULL))
    train(run, epochs)
    return run


def train(run: Run, epochs: int) -> None:
    """Epochs as far as their records go."""
    for _ in range(epochs):
        run.history.append(EpochRecord(epoch=run.epoch, phases={"0.weight": dr.Phase.FULL}, lr=0.1, spent=run.epoch))
        run.epoch += 1


def went_on(folder: Path) -> Run:
    run = run_of(0)
    restore_run_(run, *read_run(folder))
    return run


def lines(folder: Path) -> list[Any]:
    return [json.loads(line)["epoch"] for line in (folder / HISTORY).read_text().splitlines()]


def refusal(folder: Path) -> str:
    with pytest.raises(dr.StoreError) as caught:
        read_run(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_checkpoint_is_as_large_after_many_epochs_as_after_few(tmp_path: Path) -> None:
    run = run_of(2)
    save_run(run, tmp_path)
    before = (tmp_path / CHECKPOINT).stat().st_size
    train(run, 3000)
    save_run(run, tmp_path)
    assert (tmp_path / CHECKPOINT).stat().st_size < before + 100
    assert went_on(tmp_path).history == run.history


def test_records_are_added_to_the_file_which_is_not_written_anew(tmp_path: Path) -> None:
    run = run_of(2)
    save_run(run, tmp_path)
    file = (tmp_path / HISTORY).stat().st_ino
    again = went_on(tmp_path)
    for each in (run, again):
        train(each, 1)
        save_run(each, tmp_path)
        assert lines(tmp_path) == [0, 1, 2]
    assert (tmp_path / HISTORY).stat().st_ino == file


def test_what_a_killed_run_wrote_behind_its_checkpoint_goes(tmp_path: Path) -> None:
    save_run(run_of(2), tmp_path)
    with (tmp_path / HISTORY).open("a") as file:
        file.write('{"epoch": 2, "loss": ')
    run = went_on(tmp_path)
    assert len(run.history) == 2
    save_run(run, tmp_path)
    assert lines(tmp_path) == [0, 1]
    train(run, 1)
    save_run(run, tmp_path)
    assert lines(tmp_path) == [0, 1, 2]


def test_a_run_of_an_earlier_version_with_its_history_in_the_checkpoint_goes_on(tmp_path: Path) -> None:
    save_run(run_of(2), tmp_path)
    tensors, info = read_run(tmp_path)
    del info["log"], info["run"]
    store.write(tmp_path / CHECKPOINT, tensors, info)
    (tmp_path / HISTORY).write_text("of an epoch less\n")
    run = went_on(tmp_path)
    train(run, 1)
    save_run(run, tmp_path)
    assert lines(tmp_path) == [0, 1, 2]
    assert went_on(tmp_path).history == run.history


@pytest.mark.parametrize("what", ["a flipped bit", "a line less", "nothing", "of another run"])
def test_a_history_that_is_not_the_checkpoints_own_is_told(tmp_path: Path, what: str) -> None:
    save_run(run_of(3), tmp_path)
    data = (tmp_path / HISTORY).read_bytes()
    changed = {
        "a flipped bit": data[:40] + bytes([data[40] ^ 1]) + data[41:],
        "a line less": b"".join(data.splitlines(keepends=True)[:2]),
        "nothing": b"",
        "of another run": data.replace(b'"lr": 0.1', b'"lr": 0.2'),
    }[what]
    (tmp_path / HISTORY).write_bytes(changed)
    assert refusal(tmp_path) == (
        f"{tmp_path / HISTORY} is damaged or of another run: it does not begin with the 3 records that the checkpoint "
        "beside it was written with; put back the file that belongs to it"
    )
    (tmp_path / HISTORY).unlink()
    assert refusal(tmp_path).endswith(
        "history.jsonl could not be read (No such file or directory), which the checkpoint beside it needs: put it back"
    )


def test_a_metric_that_is_not_finite_leaves_json_that_others_can_read(tmp_path: Path) -> None:
    run = run_of(1)
    run.history[0] = run.history[0].with_figures(
        metric=float("nan"), loss=float("inf"), switch_error={"0.weight": float("nan")}, mine=[1.0, float("-inf")]
    )
    save_run(run, tmp_path)

    def strict(name: str) -> None:
        raise AssertionError(name)

    record = json.loads((tmp_path / HISTORY).read_text(), parse_constant=strict)
    assert (record["metric"], record["switch_error"], record["mine"]) == (None, {"0.weight": None}, [1.0, None])
    back = went_on(tmp_path).history[0]
    assert back.metric is None
    assert back.switch_error["0.weight"] != back.switch_error["0.weight"]


def test_a_full_disk_leaves_the_checkpoint_and_what_it_counts_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(2)
    save_run(run, tmp_path)
    train(run, 1)

    def full(*args: Any) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        dr.StoreError, match=r"history.jsonl could not be written \(No space left on device\); the last"
    ):
        save_run(run, tmp_path)
    monkeypatch.undo()
    assert len(went_on(tmp_path).history) == 2
    save_run(run, tmp_path)
    assert lines(tmp_path) == [0, 1, 2]


@pytest.mark.filterwarnings("ignore:This process")  # a fork beside torch's threads, which it does not use
def test_a_run_can_be_read_at_any_moment_of_its_training(tmp_path: Path) -> None:
    run = run_of(1)
    save_run(run, tmp_path)
    trainer = os.fork()
    if trainer == 0:
        try:
            for _ in range(150):
                train(run, 1)
                save_run(run, tmp_path)
        finally:
            os._exit(0)
    epochs = []
    while os.waitpid(trainer, os.WNOHANG)[0] == 0:
        _, info = read_run(tmp_path)
        assert len(info["history"]) == info["epoch"]
        epochs.append(info["epoch"])
    assert epochs == sorted(epochs)
    assert read_run(tmp_path)[1]["epoch"] == 151
