"""The watcher for TensorBoard: what it writes is what the records say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from plain_loop import SCHEDULE, a_net, data
from torch import nn
from torch.utils.data import DataLoader

import dynrank_fx as dr
from dynrank_fx.integrations.tensorboard import TensorBoard
from dynrank_fx.schedules import EpochRecord
from dynrank_fx.training import Run, Settings, Task, fit

pytestmark = pytest.mark.filterwarnings("ignore")


RECORD = EpochRecord(
    epoch=3,
    phases={"a": dr.Phase.FULL, "b": dr.Phase.LOW, "c": dr.Phase.LOW, "d": dr.Phase.ADAPTOR},
    ranks={"a": 4, "b": 2},
    lr=0.25,
    reasons=("inflate a: because", "cut b: because"),
    switch_error={"b": 0.125},
    spent=2.5,
    spent_time=3.25,
    loss=1.5,
    memory={"state": 64, "peak": 128},
)


def written(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder)).Reload()


def test_every_figure_that_is_known_is_a_scalar_of_its_epoch_counted_from_one(tmp_path):
    TensorBoard(tmp_path).epoch_done(None, RECORD)
    events = written(tmp_path)
    scalars = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert scalars == {
        "loss": [(4, 1.5)],
        "lr": [(4, 0.25)],
        "spent": [(4, 2.5)],
        "spent_time": [(4, 3.25)],
        "ranks/a": [(4, 4)],
        "ranks/b": [(4, 2)],
        "switch_error/b": [(4, 0.125)],
        "memory/state": [(4, 64)],
        "memory/peak": [(4, 128)],
        "share of sites in FULL": [(4, 0.25)],
    }


def test_the_reasons_of_a_decision_are_a_text_with_a_line_each(tmp_path):
    TensorBoard(tmp_path).epoch_done(None, RECORD)
    events = written(tmp_path)
    (tag,) = events.Tags()["tensors"]
    (event,) = events.Tensors(tag)
    assert event.step == 4
    assert event.tensor_proto.string_val[0].decode() == "inflate a: because  \ncut b: because"


def test_a_record_without_sites_and_reasons_is_written_too(tmp_path):
    watcher = TensorBoard(tmp_path)
    for epoch in range(2):
        watcher.epoch_done(None, EpochRecord(epoch=epoch, phases={}, lr=0.1, spent=1.0))
    events = written(tmp_path)
    assert [event.step for event in events.Scalars("spent")] == [1, 2]
    assert [event.value for event in events.Scalars("share of sites in FULL")] == [0, 0]
    assert events.Tags()["tensors"] == []


def test_a_run_is_shown_as_its_records_have_it(tmp_path):
    net = a_net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    loss = lambda output, batch: nn.functional.cross_entropy(output, batch[1])  # noqa: E731
    task = Task(DataLoader(data(), 8), loss, lambda batch: ((batch[0],), {}))
    run = Run(net, optimizer, SCHEDULE)
    fit(run, task, Settings(4, compile=False), watcher=TensorBoard(tmp_path))
    events = written(tmp_path)
    found = [(event.step, event.value) for event in events.Scalars("loss")]
    assert [step for step, _ in found] == [1, 2, 3, 4]
    torch.testing.assert_close([value for _, value in found], [r.loss for r in run.history], rtol=1e-5, atol=0)
    assert [event.value for event in events.Scalars("share of sites in FULL")] == [0, 1, 1, 0]
    ranks = [event.value for event in events.Scalars("effective_rank/0.weight")]
    torch.testing.assert_close(ranks, [r.effective_rank["0.weight"] for r in run.history], rtol=1e-5, atol=0)
