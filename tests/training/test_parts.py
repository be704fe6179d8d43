"""A net alone, and phases made afterwards."""

from __future__ import annotations

from pathlib import Path

import torch
from checkpointing import LOW, STEPS, Training, made, refusal
from torch.optim import SGD

import dynrank_fx as dr


def test_a_net_alone_and_phases_that_are_made_afterwards(tmp_path: Path) -> None:
    first = Training()
    first.train(range(6))
    first.save(tmp_path / "saved")
    net = made()
    loaded = dr.load_checkpoint_(tmp_path / "saved", net)
    assert dr.phases_of(net) == dr.phases_of(first.net)
    assert all(torch.equal(each, net.state_dict()[name]) for name, each in first.net.state_dict().items())
    optimizer = SGD(net.parameters(), lr=0.1)
    phases = dr.Phases(net, optimizer, dr.schedules.always(LOW), steps=STEPS, every=4, resume=loaded.phases)
    assert phases.step == 6
    dr.save_checkpoint(tmp_path / "alone", net)
    assert "written without an optimizer" in refusal(lambda: dr.load_checkpoint_(tmp_path / "alone", net, optimizer))
    assert "written without phases" in refusal(lambda: dr.load_checkpoint_(tmp_path / "alone", net, phases=phases))
