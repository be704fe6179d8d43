"""Short runs of equal compute beside one another: which way to train is worth a long run, for this model and its data.

Whether FULL steps pay, and whether a factored model is worth training at all where a narrower dense one takes as many
FLOPs, differs from task to task. So it is measured before much is spent: every way trains for the FLOPs of the same
number of dense steps, from the same weights, with the same data and half a cosine of learning rate of its own.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from statistics import fmean

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ..checks import is_whole
from ..errors import DynrankError
from ..phase import Phase
from ..phases import enter_
from ..randomness import seed_all
from ..rewrite import a_twin, inline_, plan_of
from ..schedules import Always, Schedule, auto
from .costs import cost_in_low, cost_of
from .factor_decay import Decay, decays_in_a_known_way
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
        compute: FLOPs of its training, in steps of the dense model.
        size: FLOPs of a step of what it leaves, over those of the dense model.
        loss: Held out, of what it leaves; of the last quarter of training where nothing is held out.
        metric: The same of the metric, where there is one.
        seconds: How long it took.
    """

    way: str
    options: tuple[str, ...]
    steps: int
    compute: float
    size: float
    loss: float
    metric: float | None
    seconds: float


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
    def best(self) -> Trial:
        """Of the small ones, the one of the least loss; the factored one where a narrower dense model is level."""
        first, *others = self.small
        most = first.loss + _LEVEL * abs(first.loss)
        level = [each for each in others if each.options and each.loss <= most]
        return first if first.options or not level else level[0]


def pilot(
    net: nn.Module,
    task: Task,
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
    settings: Settings,
    *,
    narrower: nn.Module | None = None,
    seed: int = 0,
    begun: Callable[[str, int], None] = lambda way, steps: None,
) -> Pilot:
    """Train short runs of equal compute: dense, LOW alone, ``auto`` with few and with more FULL steps, narrower dense.

    Args:
        net: What ``transform`` made, FULL; it stays as it is.
        task: What is trained on. Evaluated is only the end of each run.
        optimizer: Makes the optimizer of each run; its learning rate is the highest of half a cosine with a warm-up.
        settings: How to train; ``steps`` is what the dense model takes, and all others take as many FLOPs.
        narrower: A narrower dense model of about as many FLOPs as LOW, made by ``transform`` too; it stays FULL.
        seed: Of each run.
        begun: Told of every run that begins: what it is called, and its steps.

    Returns:
        What the runs came to.

    Raises:
        DynrankError: Without steps, for a narrower model of other FLOPs than LOW, and what ``fit`` raises.
    """
    if not is_whole(settings.steps, 20):
        raise DynrankError(f"a pilot of {settings.steps!r} steps says nothing: give 20 or more, and a hundred at least")
    if narrower is not None:
        _check_narrower(_flops(narrower) / _flops(net), cost_in_low(plan_of(net)))
    trials = []
    for way, options, schedule, model, compute in _ways(net, narrower):
        steps = max(20, round((settings.steps or 0) / compute))
        begun(way, steps)
        try:
            trial = _tried(way, options, schedule, model, task, optimizer, replace(settings, steps=steps), seed, net)
        except DynrankError as error:
            raise type(error)(f"{way}: {error}") from error
        trials.append(trial)
    return Pilot(tuple(trials))


def _check_narrower(share: float, low: float) -> None:
    if not low / _ALIKE <= share <= low * _ALIKE:
        raise DynrankError(
            f"the narrower model takes {share:.2f} of the dense model's FLOPs, and LOW {low:.2f}: make it of about as "
            "many, or they cannot be compared"
        )


def _ways(
    net: nn.Module, narrower: nn.Module | None
) -> Iterator[tuple[str, tuple[str, ...], Schedule, nn.Module, float]]:
    """Each way: its name and options, its schedule, what it begins with, and what its mean step costs in dense ones."""
    low = cost_in_low(plan_of(net))
    yield "dense, as it is", (), Always(Phase.FULL), net, 1.0
    yield "LOW alone", ("--schedule", "low"), Always(Phase.LOW), net, low
    for share in FULL_SHARES:
        cost = round(low + share * (1 - low), 3)
        yield f"auto, {share:.0%} FULL", ("--schedule", "auto", "--cost", f"{cost:g}"), auto(cost), net, cost
    if narrower is not None:
        yield "narrower dense", (), Always(Phase.FULL), narrower, _flops(narrower) / _flops(net)


def _tried(
    way: str,
    options: tuple[str, ...],
    schedule: Schedule,
    model: nn.Module,
    task: Task,
    make: Callable[[Iterable[nn.Parameter]], Optimizer],
    settings: Settings,
    seed: int,
    dense: nn.Module,
) -> Trial:
    started, steps = time.perf_counter(), settings.steps or 0
    seed_all(seed)
    model = copy.deepcopy(model).to(settings.device).train()
    optimizer = make(model.parameters())
    rates = LambdaLR(optimizer, lambda step: _rate(step, steps))
    decay = Decay.PRODUCT if decays_in_a_known_way(optimizer) else Decay.EACH
    settings = replace(settings, landing=True, decay=decay, spectra=False)
    run = Run(model, optimizer, schedule, rates, lr_every_step=True)
    # Every tick would be evaluated, and only the end counts.
    fit(run, replace(task, eval_data=None), settings)
    share = _flops(model) / _flops(dense)
    spent = steps * run.history[-1].spent / len(run.history) * share
    size, loss, metric = _result(run, task, settings, schedule, share)
    return Trial(way, options, steps, round(spent, 2), size, loss, metric, round(time.perf_counter() - started, 1))


def _result(
    run: Run, task: Task, settings: Settings, schedule: Schedule, share: float
) -> tuple[float, float, float | None]:
    """Size, loss and metric of what a run leaves: cut to its factors, but for a dense model."""
    small = a_twin(run.net)
    if schedule != Always(Phase.FULL):
        enter_(small, Phase.LOW)
        share = cost_of(small)
        small = inline_(small)
    if task.eval_data is None:
        last = run.history[-max(1, len(run.history) // 4) :]
        losses, metrics = [each.loss or 0.0 for each in last], [each.metric or 0.0 for each in last]
        return share, fmean(losses), fmean(metrics) if task.metric else None
    found = evaluate(small, task, settings)
    return share, found["eval_loss"] or 0.0, found["eval_metric"]


def _rate(step: int, steps: int) -> float:
    """A rise over the first steps, then half a cosine to nothing."""
    rise = (step + 1) / max(1, round(_WARM_UP * steps))
    return min(1.0, rise) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))


def _flops(net: nn.Module) -> int:
    """Of the dense model that a net was made of."""
    plan = plan_of(net)
    return plan.total_flops or plan.total_params
