"""Short runs of equal compute beside one another: which way to train is worth a long run, for this model and its data.

Whether FULL steps pay, and whether a factored model is worth training at all where a narrower dense one takes as many
FLOPs, differs from task to task. So it is measured before much is spent: every way trains for the FLOPs, or for the
measured time, of the same number of dense steps, from the same weights, with the same data and a course of the learning
rate that fits its own length.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from statistics import fmean

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ..aliases import JsonObject
from ..checks import is_number, is_whole
from ..errors import DivergedError, DynrankError
from ..phase import Phase
from ..phases import enter_
from ..randomness import generators_of, seed_all
from ..rewrite import a_twin, inline_, plan_of
from ..schedules import Always, Schedule, auto
from .costs import CostBy, check_costs, cost_in_low, cost_of
from .declared import said
from .loop import fit
from .run import Run
from .settings import Settings
from .task import Task, evaluate

FULL_SHARES = (0.12, 0.4)
"""The shares of the steps that are FULL in the two ways of ``auto``."""
_WARM_UP = 0.05  # of the steps
_ALIKE = 1.5  # by how much the FLOPs of the narrower model may differ, whose width has to fit its heads and the like
_LEVEL = 0.005  # of the loss: what is no difference between two short runs


@dataclass(frozen=True)
class Trial:
    """A way to train, and what a short run of it came to.

    Attributes:
        way: What it is called.
        options: Those of ``dynrank-fx train`` that train so; empty for the dense models.
        steps: Its optimizer steps.
        compute: What its training cost, in steps of the dense model: FLOPs, or measured time.
        size: FLOPs of a step of what it leaves, over those of the dense model.
        loss: Held out, of what it leaves; of the last quarter of training where nothing is held out. Infinite where its
            training diverged.
        metric: The same of the metric, where there is one.
        seconds: How long it took.
        schedule: The schedule of its phases.
        cost: What a mean step costs by that schedule, in steps of the dense model. A run of this way that is to cost as
            much as ``n`` dense steps has ``n / cost`` of its own.
    """

    way: str
    options: tuple[str, ...]
    steps: int
    compute: float
    size: float
    loss: float
    metric: float | None
    seconds: float
    schedule: Schedule
    cost: float

    @property
    def factored(self) -> bool:
        """Whether it leaves factors, and not a dense model."""
        return self.schedule != Always(Phase.FULL)

    def to_json(self) -> JsonObject:
        """All of it, as JSON has it: the schedule as text, and no loss where training diverged.

        Returns:
            The values by name.
        """
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        loss = self.loss if math.isfinite(self.loss) else None
        return values | {"options": list(self.options), "schedule": said(self.schedule), "loss": loss}


@dataclass(frozen=True)
class Pilot:
    """What short runs say.

    Attributes:
        trials: In the order in which they ran.
    """

    trials: tuple[Trial, ...]

    @property
    def small(self) -> tuple[Trial, ...]:
        """All but the dense one, which comes first: they leave a smaller model. The best first."""
        return tuple(sorted(self.trials[1:], key=lambda each: each.loss))

    @property
    def best_factored(self) -> Trial:
        """Of the factored ones, the one of the least loss; where others are level with it, the one of the fewest FULL
        steps.
        """
        factored = [each for each in self.small if each.factored]
        return min((each for each in factored if _level(each, factored[0])), key=lambda each: each.cost)

    @property
    def best(self) -> Trial:
        """Of the small ones, the one of the least loss; the best factored one where a narrower dense model is level."""
        first = self.small[0]
        return self.best_factored if first.factored or _level(self.best_factored, first) else first


def _level(trial: Trial, best: Trial) -> bool:
    return trial.loss <= best.loss + _LEVEL * abs(best.loss)


@dataclass(frozen=True)
class _Way:
    """A way to train before it is tried. net: what it begins with. size: FLOPs of that, over those of the dense one."""

    name: str
    options: tuple[str, ...]
    schedule: Schedule
    net: nn.Module
    cost: float
    size: float = 1.0


def pilot(
    net: nn.Module,
    task: Task,
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
    settings: Settings,
    *,
    narrower: nn.Module | None = None,
    narrower_cost: float | None = None,
    decays: bool = True,
    seed: int = 0,
    begun: Callable[[str, int], None] = lambda way, steps: None,
) -> Pilot:
    """Train short runs of equal compute: dense, LOW alone, ``auto`` with few and with more FULL steps, narrower dense.

    Args:
        net: What ``transform`` made; it stays as it is.
        task: What is trained on. Evaluated is only the end of each run.
        optimizer: Makes the optimizer of each run, at its highest learning rate.
        settings: How to train; ``steps`` is what the dense model takes, and all others cost as much by ``cost_by``.
        narrower: A narrower dense model of about as many FLOPs as LOW, made by ``transform`` too; it stays FULL.
        narrower_cost: What a step of it costs, in steps of the dense model, where costs are counted in measured time:
            ``StepTimes().whole(net, narrower, example_inputs).ratio``.
        decays: Whether the learning rate falls by half a cosine after its warm-up; False for a training at one rate.
        seed: Of each run.
        begun: Told of every run that begins: what it is called, and its steps.

    Returns:
        What the runs came to.

    Raises:
        DynrankError: Without steps, for a narrower model of other FLOPs than LOW or without its cost in time, where the
            dense model or every factored one diverges, and what else ``fit`` raises.
        ScheduleError: For costs in a time that was not measured.
    """
    if not is_whole(settings.steps, 20):
        raise DynrankError(f"a pilot of {settings.steps!r} steps says nothing: give 20 or more, and a hundred at least")
    check_costs(net, settings.cost_by)
    generators = generators_of(task.train_data)
    states = [generator.get_state() for generator in generators]
    trials = []
    for way in _ways(net, narrower, narrower_cost, settings.cost_by):
        steps = max(20, round((settings.steps or 0) / way.cost))
        begun(way.name, steps)
        try:
            trials.append(_tried(way, task, optimizer, replace(settings, steps=steps), decays, seed))
        except DivergedError as error:
            if not trials:  # at this learning rate nothing can be said
                raise DivergedError(f"{way.name}: {error}") from error
            trials.append(_diverged(way, steps))
        except DynrankError as error:
            raise type(error)(f"{way.name}: {error}") from error
        finally:  # every run sees the same data, and so does what comes after
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)
    if not any(each.factored and math.isfinite(each.loss) for each in trials):
        raise DivergedError("every factored way diverged in the pilot: lower the learning rate, or give larger ranks")
    return Pilot(tuple(trials))


def _diverged(way: _Way, steps: int) -> Trial:
    size = cost_in_low(plan_of(way.net)) if way.options else way.size
    return Trial(
        way.name, way.options, steps, round(steps * way.cost, 2), size, math.inf, None, 0.0, way.schedule, way.cost
    )


def _ways(net: nn.Module, narrower: nn.Module | None, narrower_cost: float | None, by: CostBy) -> tuple[_Way, ...]:
    plan = plan_of(net)
    low = cost_in_low(plan, by)
    ways = [
        _Way("dense, as it is", (), Always(Phase.FULL), net, 1.0),
        _Way("LOW alone", ("--schedule", "low"), Always(Phase.LOW), net, low),
    ]
    for share in FULL_SHARES if low < 1 else ():
        cost = round(low + share * (1 - low), 3)
        ways.append(
            _Way(f"auto, {share:.0%} FULL", ("--schedule", "auto", "--cost", f"{cost:g}"), auto(cost), net, cost)
        )
    if narrower is not None:
        size = _flops(narrower) / _flops(net)
        _check_narrower(size, cost_in_low(plan), narrower_cost, by)
        cost = size if by is CostBy.FLOPS else narrower_cost or size
        ways.append(_Way("narrower dense", (), Always(Phase.FULL), narrower, cost, size))
    return tuple(ways)


def _check_narrower(size: float, low: float, cost: float | None, by: CostBy) -> None:
    if not low / _ALIKE <= size <= low * _ALIKE:
        raise DynrankError(
            f"the narrower model takes {size:.2f} of the dense model's FLOPs, and LOW {low:.2f}: make it of about as "
            "many, or they cannot be compared"
        )
    if by is CostBy.TIME and (not is_number(cost, 0) or cost == 0):
        raise DynrankError(
            f"a step of the narrower model cannot cost {cost!r} of the time of a dense one: give narrower_cost, as "
            "StepTimes().whole(net, narrower, example_inputs).ratio measures it, or leave the model out"
        )


def _tried(
    way: _Way,
    task: Task,
    make: Callable[[Iterable[nn.Parameter]], Optimizer],
    settings: Settings,
    decays: bool,
    seed: int,
) -> Trial:
    started, steps = time.perf_counter(), settings.steps or 0
    seed_all(seed)
    model = copy.deepcopy(way.net).to(settings.device).train()
    optimizer = make(model.parameters())
    rates = LambdaLR(optimizer, lambda step: _rate(step, steps, decays))
    # A dense model costs the same in every step, and a narrower one was timed as a whole.
    settings = replace(settings, spectra=False, cost_by=settings.cost_by if way.options else CostBy.FLOPS)
    run = Run(model, optimizer, way.schedule, rates, lr_every_step=True)
    # Every tick would be evaluated, and only the end counts.
    fit(run, replace(task, eval_data=None), settings)
    last = run.history[-1]
    of_all = last.spent if settings.cost_by is CostBy.FLOPS else last.spent_time
    assert of_all is not None, "check_costs came first"
    spent = steps * of_all / len(run.history) * (1 if way.options else way.cost)
    size, loss, metric = _result(run, task, settings, way)
    seconds = round(time.perf_counter() - started, 1)
    return Trial(way.name, way.options, steps, round(spent, 2), size, loss, metric, seconds, way.schedule, way.cost)


def _result(run: Run, task: Task, settings: Settings, way: _Way) -> tuple[float, float, float | None]:
    """Size, loss and metric of what a run leaves: cut to its factors, but for a dense model."""
    small, size = a_twin(run.net), way.size
    if way.options:
        enter_(small, Phase.LOW)
        size = cost_of(small)
        small = inline_(small)
    if task.eval_data is None:
        last = run.history[-max(1, len(run.history) // 4) :]
        losses, metrics = [each.loss or 0.0 for each in last], [each.metric or 0.0 for each in last]
        return size, fmean(losses), fmean(metrics) if task.metric else None
    found = evaluate(small, task, settings)
    return size, found["eval_loss"] or 0.0, found["eval_metric"]


def _rate(step: int, steps: int, decays: bool) -> float:
    """A rise over the first steps, then half a cosine to nothing, or one rate to the end."""
    rise = min(1.0, (step + 1) / max(1, round(_WARM_UP * steps)))
    return rise * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))) if decays else rise


def _flops(net: nn.Module) -> int:
    """Of the dense model that a net was made of."""
    plan = plan_of(net)
    return plan.total_flops or plan.total_params
