"""The watcher for TensorBoard: what it writes is what the records say."""

from __future__ import annotations

import pytest
import torch
from plain_loop import SCHEDULE, a_net, data
from torch import nn
from torch.utils.data import DataLoader

pytestmark = pytest.mark.filterwarnings("ignore")


def test_tensorboard_shows_what_the_records_say(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from dynrank_fx.integrations.tensorboard import TensorBoard
    from dynrank_fx.training import Run, Settings, Task, fit

    net = a_net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    loss = lambda output, batch: nn.functional.cross_entropy(output, batch[1])  # noqa: E731
    task = Task(DataLoader(data(), 8), loss, lambda batch: ((batch[0],), {}))
    run = Run(net, optimizer, SCHEDULE)
    fit(run, task, Settings(4, compile=False), watcher=TensorBoard(tmp_path))
    events = EventAccumulator(str(tmp_path)).Reload()
    found = [(event.step, event.value) for event in events.Scalars("loss")]
    assert [step for step, _ in found] == [1, 2, 3, 4]
    torch.testing.assert_close([value for _, value in found], [r.loss for r in run.history], rtol=1e-5, atol=0)
    assert [event.value for event in events.Scalars("share of sites in FULL")] == [0, 1, 1, 0]
    ranks = [event.value for event in events.Scalars("effective_rank/0.weight")]
    torch.testing.assert_close(ranks, [r.effective_rank["0.weight"] for r in run.history], rtol=1e-5, atol=0)
