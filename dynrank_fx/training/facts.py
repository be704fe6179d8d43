"""What a schedule is told: where training stands, what the sites cost, and their spectra when it looks at them."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence

import torch
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from ..checks import check_epochs, is_list, is_number, is_whole
from ..errors import DynrankWarning, ScheduleError
from ..phases import optimizers_in, phases_of
from ..rewrite import plan_of
from ..schedules import SiteState, TrainState
from ..text import counted
from .clock import Clock
from .costs import CostBy, check_costs, costs_in
from .deciding import SitesSpectra


def train_state(
    net: nn.Module,
    optimizer: Optimizer,
    epoch: int,
    epochs: int,
    lr_scheduler: LRScheduler | None = None,
    *,
    steps_per_epoch: int = 1,
    rates: Sequence[float] = (),
    spent: float = 0.0,
    cost_by: CostBy = CostBy.FLOPS,
) -> TrainState:
    """The state of a training at the start of an epoch, for a schedule to look at.

    Spectra are computed when the schedule asks for them.

    Args:
        net: What ``transform`` made.
        optimizer: The optimizer over its parameters.
        epoch: The epoch that begins, counted from 0.
        epochs: How many epochs the run has.
        lr_scheduler: The learning-rate scheduler, of which the rates to come are read; None for a constant rate.
        steps_per_epoch: How often it is stepped in an epoch.
        rates: The learning rates of the epochs so far.
        spent: Training compute so far, in epochs of the dense model: the sum of ``cost_of`` over the epochs.
        cost_by: What costs are counted in, those of the sites and what was spent.

    Returns:
        The state.

    Raises:
        PlanError: For a net without a plan.
        ScheduleError: For epochs or steps that cannot be, and for measured time where nothing was measured.
    """
    check_epoch(epoch, epochs)
    if not is_whole(steps_per_epoch, 1):
        raise ScheduleError(f"an epoch cannot have {steps_per_epoch!r} steps of the scheduler: give 1 or more")
    (optimizer,) = optimizers_in((optimizer,))
    check_scheduler(lr_scheduler)
    if not is_list(rates) or not all(map(is_number, rates)) or not is_number(spent, 0):
        raise ScheduleError(f"rates {rates!r} and spent {spent!r} cannot be: give a list of numbers, and a number")
    planned = planned_rates(optimizer, lr_scheduler, epochs - epoch, steps_per_epoch)
    return state_at(net, optimizer, epoch, epochs, planned, rates=rates, spent=spent, cost_by=cost_by)


def state_at(
    net: nn.Module,
    optimizer: Optimizer,
    tick: int,
    ticks: int,
    planned: Sequence[float],
    *,
    rates: Sequence[float],
    spent: float,
    unit: str = "epoch",
    cost_by: CostBy = CostBy.FLOPS,
) -> TrainState:
    """As ``train_state``, at any tick. planned: the learning rates from this tick on, empty where they are unknown."""
    check_costs(net, cost_by)
    plan, phases = plan_of(net), phases_of(net)
    sites = {}
    for row in plan.sites:
        dense, low = costs_in(plan, row, cost_by)
        groups = row.site.params // math.prod(row.layout.matrix_shape(row.site.shape))
        sites[row.site.name] = SiteState(phases[row.site.name], row.rank, dense, low, groups, row.sharing)
    known = (*rates, *planned) if planned and len(rates) == tick else ()
    lr = planned[0] if planned else float(optimizer.param_groups[0]["lr"])
    return TrainState(tick, ticks, lr, SitesSpectra(net), spent, known, sites, unit)


def check_scheduler(lr_scheduler: LRScheduler | None, optimizers: Sequence[Optimizer] = ()) -> None:
    """Raises ScheduleError for what is no scheduler of learning rates, of torch's kind or of another, and for one of
    torch's that is of none of the optimizers.
    """
    steps = callable(getattr(lr_scheduler, "step", None)) and not isinstance(lr_scheduler, type)
    if lr_scheduler is not None and not steps:
        raise ScheduleError(f"{lr_scheduler!r} is no scheduler of learning rates: give one of torch's, or leave it out")
    if isinstance(lr_scheduler, LRScheduler) and optimizers:
        (its,) = optimizers_in((lr_scheduler.optimizer,))
        if not any(its is each for each in optimizers):
            raise ScheduleError(
                f"{type(lr_scheduler).__name__} is of another optimizer than the phases: make it of theirs"
            )


def check_epoch(epoch: int, epochs: int) -> None:
    """Raises ScheduleError for an epoch that is not of the run."""
    check_epochs(epochs)
    if not is_whole(epoch) or epoch >= epochs:
        raise ScheduleError(
            f"epoch {epoch!r} is none of a run of {counted(epochs, 'epoch')}, which count from 0 to {epochs - 1}"
        )


def planned_rates(
    optimizer: Optimizer, lr_scheduler: LRScheduler | None, epochs: int, steps: int = 1
) -> tuple[float, ...]:
    """The learning rate of the first group now and at the start of the following epochs, ``epochs`` of them.

    lr_scheduler: one that is stepped so many times an epoch, or None for a constant rate. Empty where the rates depend
    on what is not known yet (ReduceLROnPlateau) or the scheduler is none of torch's kind. Nothing is changed.
    """
    return rates_after(optimizer, lr_scheduler, [i * steps for i in range(epochs)])


def rates_after(optimizer: Optimizer, lr_scheduler: LRScheduler | None, counts: Sequence[int]) -> tuple[float, ...]:
    """As ``planned_rates``, after these numbers of steps of the scheduler from now on, which rise."""
    if lr_scheduler is None:
        return (float(optimizer.param_groups[0]["lr"]),) * len(counts)
    if isinstance(lr_scheduler, ReduceLROnPlateau) or not isinstance(lr_scheduler, LRScheduler):
        return ()
    dummy = _stand_in(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of steps without an optimizer's, and beyond a schedule's end
        twin = copy.deepcopy(lr_scheduler, {id(optimizer): dummy, id(lr_scheduler.optimizer): dummy})
        rates, done = [], 0
        for count in counts:
            try:
                for _ in range(count - done):
                    twin.step()
            except ValueError:  # OneCycleLR has an end
                break
            done = count
            rates.append(float(dummy.param_groups[0]["lr"]))
    return tuple(rates)


def warn_of_rates(lr_scheduler: LRScheduler | None, clock: Clock, every_step: bool) -> None:
    """Warn where the scheduler plans a number of steps of its own (OneCycleLR) that is not the one it will make."""
    planned, coming = getattr(lr_scheduler, "total_steps", None), clock.scheduler_steps(clock.ticks, every_step)
    if not isinstance(planned, int) or coming is None:
        return
    if planned < coming:
        when = "after every optimizer step" if every_step else "once an epoch"
        what = f"is stepped {counted(coming, 'time')}, {when}: give it total_steps={coming}"
    elif not every_step and planned > coming + 1:
        what = (
            f"is stepped {counted(coming, 'time')}, once an epoch, so that the learning rate stays near its start: "
            "step it after "
            'every optimizer step and say so (lr_every_step=True; in a model file, return scheduler, "step")'
        )
    else:
        return
    warnings.warn(
        f"{type(lr_scheduler).__name__} plans {counted(planned, 'step')} and {what}", DynrankWarning, stacklevel=4
    )


def _stand_in(optimizer: Optimizer) -> Optimizer:
    """An optimizer with the same groups, each of one number."""
    dummy = SGD([torch.zeros(1)], lr=0.0)
    dummy.param_groups.clear()
    for group in optimizer.param_groups:
        settings = {key: copy.deepcopy(value) for key, value in group.items() if key not in ("params", "param_names")}
        dummy.param_groups.append({**settings, "params": [torch.zeros(1)]})
    return dummy
