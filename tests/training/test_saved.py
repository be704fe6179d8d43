"""What one process has written till now goes on."""

from __future__ import annotations

from pathlib import Path

from checkpointing import FULL, LOW, X, Y, made, unequal
from torch import nn
from torch.optim import AdamW

import dynrank_fx as dr
from dynrank_fx.training import Run, Settings, Task, fit, save_run


def test_what_one_process_has_written_till_now_goes_on(tmp_path: Path) -> None:
    """A net of ``save``, and a run of the command: weights, phases, optimizer and schedule."""
    net = made()
    dr.enter_(net, {"first": LOW})
    dr.save(net, tmp_path / "net")
    again = made()
    optimizer = AdamW(again.parameters())
    loaded = dr.load_checkpoint_(tmp_path / "net", again, optimizer)
    assert (loaded.phases, loaded.extra) == (None, {})
    assert unequal(again.state_dict(), net.state_dict()) == []
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in again.parameters()}
    dr.Phases(again, optimizer, dr.schedules.always(FULL), steps=4)  # a run of its own, from its first step on
    assert set(dr.phases_of(again).values()) == {FULL}

    batches = list(zip(X.split(16), Y.split(16), strict=True))
    task = Task(
        batches, lambda output, batch: nn.functional.mse_loss(output, batch[1]), lambda batch: ((batch[0],), {})
    )
    net, schedule = made(), dr.schedules.interleave(low=1, full=1)
    run = Run(net, AdamW(net.parameters(), lr=0.01), schedule)

    def save(run: Run) -> None:
        if run.epoch == 3 and not (tmp_path / "run").exists():
            (tmp_path / "run").mkdir()
            save_run(run, tmp_path / "run")

    fit(run, task, Settings(epochs=6, compile=False, landing=True, rewarm=3), save=save)
    again = made()
    optimizer = AdamW(again.parameters(), lr=0.5)
    phases = dr.Phases(again, optimizer, schedule, 6, steps=4, landing=True, rewarm=3)
    loaded = dr.load_checkpoint_(tmp_path / "run", again, phases=phases)
    assert loaded.extra == {"epoch": 3, "step": 0}
    assert optimizer.param_groups[0]["lr"] == 0.01
    for epoch in range(3, 6):
        if phases.is_due(epoch):
            phases.begin(epoch)
        for x, y in batches:
            optimizer.zero_grad()
            nn.functional.mse_loss(again(x), y).backward()
            optimizer.step()
    assert unequal(again.state_dict(), net.state_dict(), 1e-6) == []
    assert [record.phase for record in phases.history] == [record.phase for record in run.history]
