"""A training that has diverged is told by the name of what is not finite, before a checkpoint of it is gone on from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import dynrank_fx as dr


def trained() -> tuple[nn.Module, torch.optim.SGD, dr.Phases]:
    """A training that is well, with a mask that is infinite as it should be, and one of 8 bits."""
    torch.manual_seed(0)
    net = dr.transform(nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Linear(16, 8)), (torch.zeros(2, 12),))
    net.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    net.register_buffer("bits", torch.ones(2).to(torch.float8_e4m3fn))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    phases = dr.Phases(net, optimizer, dr.schedules.always(dr.Phase.FULL), 2)
    phases.begin(0)
    net(torch.randn(4, 12)).square().sum().backward()
    optimizer.step()
    return net, optimizer, phases


@pytest.mark.parametrize("what", ["running_var", "momentum_buffer", "weight", "lr"])
def test_a_state_of_a_training_that_has_diverged_is_told_whatever_saves_it(what: str, tmp_path: Path) -> None:
    net, optimizer, phases = trained()
    assert phases.diverged() is None
    dr.save(net, tmp_path / "net")
    phases.state_dict()  # without a word of the mask, which was so before
    momentum = optimizer.state[next(net.parameters())]["momentum_buffer"]
    if what == "lr":
        optimizer.param_groups[0]["lr"] = torch.nan
    else:
        values = {"running_var": net.get_buffer("1.running_var"), "momentum_buffer": momentum}
        values.get(what, net.get_parameter("2.weight").data)[0] = torch.inf if what == "running_var" else torch.nan
    found = {
        "running_var": "1.running_var",
        "momentum_buffer": "the optimizer's momentum_buffer of 0.weight",
        "weight": "2.weight",
        "lr": "the learning rate",
    }
    assert phases.diverged() == found[what]
    sentence = f"^{found[what]} is not finite, as in a training that has diverged: what is saved now is nothing to go"
    savers: list[Callable[[], object]] = [
        phases.state_dict,
        lambda: dr.save_checkpoint(tmp_path / "c", net, phases=phases),
        lambda: dr.save_checkpoint(tmp_path / "c", net, optimizer),
    ]
    if what in ("running_var", "weight"):
        savers.append(lambda: dr.save(net, tmp_path / "net"))
    for save in savers:
        with pytest.warns(dr.DynrankWarning, match=sentence):
            save()


def test_figures_that_are_not_finite_are_noted_and_leave_json_that_others_can_read() -> None:
    _, _, phases = trained()
    phases.note(loss=float("nan"), mine=float("inf"))
    (record,) = json.loads(json.dumps(phases.state_dict()["history"], allow_nan=False))
    assert (record["loss"], record["mine"]) == (None, None)


def test_an_average_that_is_not_finite_is_told_too(tmp_path: Path) -> None:
    net, optimizer, first = trained()
    first.remove()
    average = torch.optim.swa_utils.AveragedModel(net)
    phases = dr.Phases(net, optimizer, dr.schedules.always(dr.Phase.LOW), 2, averages=average)
    phases.begin(0)
    assert phases.diverged() is None
    average.module.get_parameter("2.left").data[0] = torch.nan
    assert phases.diverged() == "module.2.left of an average"
    with pytest.warns(dr.DynrankWarning, match=r"^module\.2\.left of an average is not finite"):
        dr.save_checkpoint(tmp_path / "c", net, phases=phases)
