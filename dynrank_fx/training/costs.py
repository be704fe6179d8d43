"""What a training step costs, as a share of one of the dense model: in FLOPs, or in time that was measured."""

from __future__ import annotations

import enum
import warnings

from torch import nn

from ..checks import names_of
from ..errors import DynrankWarning, ScheduleError
from ..phase import Phase
from ..phases import phases_of
from ..plan import Plan, PlannedSite
from ..rewrite import plan_of
from ..schedules import Auto, Schedule


class CostBy(enum.Enum):
    """What a schedule's budget is counted in.

    Attributes:
        FLOPS: Floating-point operations; parameters where those are not known.
        TIME: Time of a training step, forward and backward, as it was measured when the plan was made
            (``transform(times=)``).
    """

    FLOPS = "FLOPs"
    TIME = "measured time"


def checked_cost_by(by: CostBy) -> CostBy:
    """The choice itself. Raises ScheduleError for what is none."""
    if not isinstance(by, CostBy):
        raise ScheduleError(f"cost_by is {by!r}: give one of {names_of(CostBy)}")
    return by


def is_timed(plan: Plan) -> bool:
    """Whether it is known what each site takes of the time of a step."""
    return plan.low_time is not None


def check_costs(net: nn.Module, by: CostBy) -> None:
    """Raises ScheduleError where costs of the net cannot be counted so."""
    if checked_cost_by(by) is CostBy.TIME and not is_timed(plan_of(net)):
        raise ScheduleError(
            "the plan has no measured times to count costs by: make it by transform(..., times=StepTimes()), or on the "
            "command line with --measure"
        )


def cost_of(net: nn.Module, by: CostBy = CostBy.FLOPS) -> float:
    """What a training step costs in the present setting, with a step of the dense model as 1.

    The base of an ADAPTOR takes two of the three products of a dense step, which needs no gradient of it.

    Args:
        net: What ``transform`` made.
        by: What is counted.

    Returns:
        The cost of a step, in dense steps.

    Raises:
        PlanError: For a net without a plan.
        ScheduleError: For measured time where nothing was measured.
    """
    check_costs(net, by)
    plan, phases = plan_of(net), phases_of(net)
    more = 0.0
    for row in plan.sites:
        dense, low = costs_in(plan, row, by)
        more += {Phase.FULL: 0.0, Phase.LOW: low - dense, Phase.ADAPTOR: low - dense / 3}[phases[row.site.name]]
    return 1 + more


def cost_in_low(plan: Plan, by: CostBy = CostBy.FLOPS) -> float:
    """What a training step costs with every site in LOW, in dense steps: the least that any schedule can keep to."""
    return 1 + sum(low - dense for dense, low in (costs_in(plan, row, by) for row in plan.sites))


def warn_of_budget(schedule: Schedule, plan: Plan, by: CostBy) -> None:
    """Warn where no phases keep to the budget of ``auto``."""
    if isinstance(schedule, Auto) and schedule.cost < (least := round(cost_in_low(plan, by), 2)):
        warnings.warn(
            f"LOW alone costs {least} of dense training, and the schedule's budget is {schedule.cost:g}: it is not "
            "kept to; give smaller ranks, or a larger cost",
            DynrankWarning,
            stacklevel=3,
        )


def costs_in(plan: Plan, row: PlannedSite, by: CostBy) -> tuple[float, float]:
    """What a site costs dense and factored, in shares of a step of the model. One without FLOPs runs in training only:
    as in the plan's own total, it counts nothing.
    """
    if by is CostBy.TIME:
        assert row.step is not None, "check_costs comes first"
        return row.step
    if plan.total_flops:
        return (row.site.flops or 0) / plan.total_flops, (row.flops or 0) / plan.total_flops
    return row.site.params / plan.total_params, row.params / plan.total_params
