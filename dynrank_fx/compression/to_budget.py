"""``compress``: a trained model, dense or of phase training, made smaller or faster within a budget, and measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ..errors import PlanError
from ..phase import Phase
from ..phases import Timing, enter_, phases_of
from ..plan import Budget, RankPolicy, Ratio, Role
from ..rewrite import a_twin, holds_captured, inline_, plan_of, transform
from ..tracing import own_, shell, unwrap
from .batches import checked_batches
from .calibration import calibrate
from .candidates import Candidate, Candidates
from .model_times import ModelTimes
from .recover import Loss, recover_
from .result import NOISE, Compressed, compressed
from .site_times import SiteTimes

_MARGINS = (0.0, 0.15, 0.35, 1.0)
"""How much faster than dense a site has to be, tried in turn until the whole model is no slower; at 1 all are dense."""
_TIGHTENINGS = 3


@dataclass(frozen=True)
class MaxDrop:
    """The fewest parameters with which the metric falls by at most this much."""

    drop: float

    def __post_init__(self) -> None:
        if not 0 <= self.drop < math.inf:
            raise PlanError(f"a metric cannot fall by at most {self.drop}; give a number of 0 or more")


def compress(
    model: nn.Module,
    example_inputs: Any,
    budget: RankPolicy | MaxDrop,
    calibration: Iterable[Any] | None = None,
    *,
    metric: Callable[[nn.Module], float] | None = None,
    recover_steps: int = 0,
    loss: Loss | None = None,
    times: SiteTimes | None = None,
    multiple_of: int = 1,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    leave: Collection[Role] = (),
    sequential: bool = False,
) -> Compressed:
    """Cut a trained model to a budget so that its outputs change least, and measure what became of it.

    model: any nn.Module, or a net of ``transform`` in any phase. budget: ``Budget(flops=0.5)`` and the like,
    ``MaxDrop(0.01)`` of ``metric`` (larger is better), or any rank policy. calibration: batches of inputs; without
    them the cut is a plain SVD. recover_steps: of fine-tuning towards the dense model's outputs, or by ``loss(output,
    number of the calibration batch)``. times: measures sites where the model is to run (the shapes are those of the
    example inputs); a site that is not faster factored stays dense, and the whole is never slower than the dense model,
    unless the budget is one of parameters. None to measure nothing. multiple_of: ranks are multiples of it. include,
    exclude, leave: as in ``make_plan``. sequential: as in ``truncate``.

    Raises PlanError for a budget that cannot be met (and says the least one that can), CalibrationError for data that
    do not serve; the model stays as it is.
    """
    data = None if calibration is None else checked_batches(calibration, like=example_inputs)
    if sequential and data is None:
        raise PlanError("to calibrate one layer after the other takes calibration data, and there are none: give some")
    if multiple_of < 1 or recover_steps < 0:
        raise PlanError(f"multiple_of={multiple_of}, recover_steps={recover_steps}: give 1 or more, and 0 or more")
    if recover_steps and data is None:
        raise PlanError("to recover takes calibration data, and there are none: give some, or leave the recovery out")
    if isinstance(budget, MaxDrop) and metric is None:
        raise PlanError("a budget of the metric's fall takes a metric, and data to score on: give both")
    net, low = _in_full(model, example_inputs, include, exclude, leave)
    dense = inline_(shell(net))
    known = None if data is None else calibrate(net, data)
    whole = None if times is None else ModelTimes(dense, example_inputs, times)
    candidates = Candidates(net, dense, data, known, _timing(whole), multiple_of, sequential, low)

    def made(policy: RankPolicy, margin: float | None) -> Candidate:
        found = candidates.best(policy, margin)
        own_(found.module, net)
        if data is not None and recover_steps and any(cut.error > 0 for cut in found.cuts):
            recover_(found.module, dense, data, recover_steps, loss=loss)
        return found

    def at(margin: float | None) -> Compressed:
        def result(policy: RankPolicy | MaxDrop) -> Compressed:
            if isinstance(policy, MaxDrop):
                assert metric is not None
                wanted = _scored(metric, dense) - policy.drop
                found = _least(lambda each: made(each, margin), lambda module: metric(module) >= wanted)
            else:
                found = made(policy, margin)
            pair, why = (None, "") if whole is None else (whole.pair(found.module), whole.why)
            return compressed(plan_of(net), found.module, found.cuts, known, pair, why)

        if isinstance(budget, Budget) and budget.latency is not None:
            return _in_time(budget, budget.latency, result)
        return result(budget)

    size_asked = isinstance(budget, Budget) and budget.params is not None
    found = at(None) if size_asked or whole is None or whole.dense is None else _no_slower(at)
    if times is not None:
        times.save()
    metrics = None if metric is None else (_scored(metric, dense), _scored(metric, found.module))
    return replace(found, metrics=metrics)


def _in_full(
    model: nn.Module, example_inputs: Any, include: Sequence[str], exclude: Sequence[str], leave: Collection[Role]
) -> tuple[nn.Module, dict[str, int]]:
    """The model as a net in evaluation mode, every site dense, and the ranks of those that were factored before."""
    if holds_captured(unwrap(model)):
        net = a_twin(model)
    else:
        made = transform(
            model,
            example_inputs,
            rank=Ratio(0.25),
            include=include,
            exclude=exclude,
            leave=leave,
            allow_unprofitable=True,
            copy=False,
        )
        net = a_twin(made)
    phases = phases_of(net)
    low = {row.site.name: row.rank for row in plan_of(net).sites if phases[row.site.name] is Phase.LOW}
    enter_(net, Phase.FULL)
    return net, low


def _timing(whole: ModelTimes | None) -> Timing | None:
    """Times of sites in shares of the dense model's."""
    if whole is None or whole.dense is None:
        return None
    sites, total = whole.sites, whole.dense
    return lambda rows: sites.cost(rows, total)


def _in_time(budget: Budget, asked: float, result: Callable[[Budget], Compressed]) -> Compressed:
    """The result that is measured to take the share of time that was asked for: the times of single sites may add up
    to less than the whole takes, and the budget is tightened by what is missing.
    """
    best, share = result(budget), asked
    for _ in range(_TIGHTENINGS):
        if best.times is None or best.times.ratio <= asked + NOISE:
            return best
        share *= asked / best.times.ratio
        try:
            found = result(replace(budget, latency=share))
        except PlanError:  # there is no less
            break
        if found.times is not None and found.times.ratio < best.times.ratio:
            best = found
    if best.times is None or best.times.ratio <= asked + NOISE:
        return best
    missed = f"Asked for {asked:g} of the dense model's time; the least that was reached is {best.times.ratio:.2f}."
    return replace(best, notes=(*best.notes, missed))


def _no_slower(at: Callable[[float], Compressed]) -> Compressed:
    """The first result that is not slower than the dense model, by rising margins."""
    notes: tuple[str, ...] = ()
    for margin in _MARGINS:
        try:
            found = at(margin)
        except PlanError as error:
            raise PlanError(
                f"{error}. Only layers that are faster than dense count here: a budget of parameters asks for size "
                "alone"
            ) from error
        assert found.times is not None
        if margin == _MARGINS[-1] or found.times.ratio <= 1 + NOISE:
            break
        notes = (
            f"The whole model took {found.times.ratio:.2f} of the dense one's time with every layer that is faster by "
            "itself, so that those least faster stayed dense.",
        )
    return replace(found, notes=(*found.notes, *notes))


def _least(made: Callable[[RankPolicy], Candidate], good: Callable[[nn.Module], bool]) -> Candidate:
    """The good one of fewest parameters, by bisection of the budget."""
    low, high, best = 0.0, 1.0, made(Budget(params=1.0))
    for _ in range(8):
        share = (low + high) / 2
        try:
            found = made(Budget(params=share))
        except PlanError:  # rank 1 everywhere is still larger
            low = share
            continue
        if good(found.module):  # not where the metric is no number
            high, best = share, found
        else:
            low = share
    return best


def _scored(metric: Callable[[nn.Module], float], module: nn.Module) -> float:
    said = metric(module)
    try:
        value = float(said)
    except (TypeError, ValueError) as error:
        raise PlanError(f"the metric is {said!r} and no number: return one") from error
    if not math.isfinite(value):
        raise PlanError(f"the metric is {value}, which nothing can be compared with: see that it is a finite number")
    return value
