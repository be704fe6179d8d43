"""The learning rate after a switch: up again within so many steps, where neither schedulers nor logs see it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import Parameter
from torch.optim import SGD

import dynrank_fx as dr
from dynrank_fx.training.rewarm import Rewarm


def test_rewarm_scales_the_next_steps_only_and_hides_from_schedulers():
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    rewarm = dr.rewarm_(optimizer, 4)
    moved = []
    for _ in range(6):
        parameter.grad = torch.ones(1)
        before = parameter.item()
        optimizer.step()
        moved.append(round(before - parameter.item(), 6))
        assert optimizer.param_groups[0]["lr"] == 1.0
    assert moved == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert rewarm.left == 0
    with pytest.raises(dr.TransitionError, match="-1 steps"):
        dr.rewarm_(optimizer, -1)


def test_rewarm_scales_once_where_a_subclass_calls_its_bases_step():
    class Sub(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    other = nn.Parameter(torch.zeros(1))
    other.grad = torch.ones(1)
    torch.optim.SGD([other], lr=0.1).step()  # torch wraps the base's step when it is first used
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = Sub([parameter], lr=1.0)
    dr.rewarm_(optimizer, 2)
    for moved in (0.5, 1.0, 1.0):
        parameter.grad = torch.ones(1)
        before = parameter.item()
        optimizer.step()
        assert before - parameter.item() == pytest.approx(moved)
        assert optimizer.param_groups[0]["lr"] == 1.0


def moved(steps: int, rewarm: Rewarm | None, parameter: Parameter, optimizer: SGD) -> list[float]:
    """How far each step of plain descent moves a parameter whose gradient is 1: the rate that it was made at."""
    far = []
    for _ in range(steps):
        before = parameter.item()
        parameter.grad = torch.ones(())
        optimizer.step()
        far.append(before - parameter.item())
    return far


def test_it_goes_on_from_where_a_checkpoint_left_it() -> None:
    whole, parts = Parameter(torch.zeros(())), Parameter(torch.zeros(()))
    first = SGD([whole], lr=1.0)
    expected = moved(6, dr.rewarm_(first, 5), whole, first)
    assert expected == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])

    second = SGD([parts], lr=1.0)
    stopped = dr.rewarm_(second, 5)
    found = moved(2, stopped, parts, second)
    third = SGD([parts], lr=1.0)
    found += moved(4, Rewarm(third, stopped.steps, left=stopped.left), parts, third)
    assert found == pytest.approx(expected)


def test_it_takes_itself_off_and_can_be_stopped_before() -> None:
    parameter = Parameter(torch.zeros(()))
    optimizer = SGD([parameter], lr=1.0)
    rewarm = dr.rewarm_(optimizer, 4)
    moved(1, rewarm, parameter, optimizer)
    rewarm.stop()
    assert rewarm.left == 0
    assert moved(1, rewarm, parameter, optimizer) == pytest.approx([1.0])
    assert not optimizer._optimizer_step_pre_hooks
    dr.rewarm_(optimizer, 2)
    moved(2, None, parameter, optimizer)
    assert not optimizer._optimizer_step_pre_hooks
    dr.rewarm_(optimizer, 0)
    assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize("steps", [-1, 2.5, "30", True])
def test_what_is_no_number_of_steps(steps: Any) -> None:
    with pytest.raises(dr.TransitionError, match=r"a learning rate cannot re-warm over .* steps; give 0 or more"):
        dr.rewarm_(SGD([Parameter(torch.zeros(()))], lr=1.0), steps)


def test_hooks_of_others_that_come_later_are_not_disturbed_when_it_ends() -> None:
    parameter, called = Parameter(torch.zeros(())), []
    optimizer = SGD([parameter], lr=1.0)
    dr.rewarm_(optimizer, 2)
    optimizer.register_step_post_hook(lambda *_: called.append(1))
    assert moved(3, None, parameter, optimizer) == pytest.approx([0.5, 1.0, 1.0])
    assert len(called) == 3


def test_it_begins_anew_in_the_midst_of_itself() -> None:
    parameter = Parameter(torch.zeros(()))
    optimizer = SGD([parameter], lr=1.0)
    rewarm = Rewarm(optimizer, 0)
    assert moved(1, rewarm, parameter, optimizer) == pytest.approx([1.0])
    rewarm.restart(4)
    assert moved(2, rewarm, parameter, optimizer) == pytest.approx([0.25, 0.5])
    rewarm.restart(2)
    assert moved(3, rewarm, parameter, optimizer) == pytest.approx([0.5, 1.0, 1.0])
