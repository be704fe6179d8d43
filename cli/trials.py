"""Short runs of equal compute, as ``pilot`` and ``train --pilot`` run them and tell of them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from dynrank_fx.errors import DynrankError, ModelFileError
from dynrank_fx.text import text_table

from .options import step_times_of, transformed
from .streams import echo

if TYPE_CHECKING:
    from torch import nn

    from dynrank_fx.plan import Plan
    from dynrank_fx.training import Pilot, Settings, Task, Trial

    from .modelfile import ModelFile
    from .options import Options

_TRIES, _NEAR = 5, 0.05  # of the narrower width; how near the logarithm of its FLOPs shall come


def tried(net: nn.Module, file: ModelFile, task: Task, settings: Settings, options: Options) -> Pilot:
    """The runs, each of which is told when it begins; among them narrower(share), where the file has it."""
    from dynrank_fx.rewrite import plan_of
    from dynrank_fx.training import CostBy, check_costs, pilot

    check_costs(net, settings.cost_by)
    # Beside a model that begins with trained weights a narrower one would begin with random ones.
    narrower = None if begins_trained(options) else _narrower(file, options, plan_of(net), options["seed"])
    cost = None
    if narrower is not None and settings.cost_by is CostBy.TIME:
        pair = step_times_of(file, options).whole(net, narrower, file.example_inputs())
        cost = None if pair is None else pair.ratio
    return pilot(
        net,
        task,
        file.optimizer,
        settings,
        narrower=narrower,
        narrower_cost=cost,
        decays=file.has("lr_scheduler"),
        seed=options["seed"],
        begun=lambda way, count: echo(f"{way}: {count} steps", err=True),
    )


def begins_trained(options: Options) -> bool:
    """Whether the model begins with weights of an earlier training."""
    return options["weights"] is not None or options.get("start") is not None


def _narrower(file: ModelFile, options: Options, plan: Plan, seed: int) -> nn.Module | None:
    """The narrower model as a net, so that it is trained and counted as the others are. Its share of the width is
    sought until its FLOPs are those of LOW, as near as its widths allow.
    """
    from dynrank_fx.randomness import seed_all
    from dynrank_fx.rewrite import plan_of

    share, wanted = plan.narrower, plan.low_flops
    if share is None or not wanted:
        return None
    others = options | {"plan_file": None, "measure": False}  # a plan is of the wider one, as are its times
    found: dict[float, nn.Module] = {}
    for _ in range(_TRIES):
        seed_all(seed)
        model = file.narrower(share)
        if model is None:
            return None
        try:
            net = transformed(file, others, model=model)
        except DynrankError as error:
            raise ModelFileError(f"{file.path.name}: narrower({share:.3g}) is of another kind: {error}") from error
        over = (plan_of(net).total_flops or 1) / wanted
        found[abs(math.log(over))] = net
        if min(found) < _NEAR:
            break
        share = min(1.0, share / math.sqrt(over))
    return found[min(found)]


def table(found: Pilot, task: Task, metric: str) -> str:
    """What each run came to. metric: what it is called."""
    with_metric = any(each.metric is not None for each in found.trials)
    where = "training" if task.eval_data is None else "held-out"
    head = (
        "way",
        "steps",
        "compute",
        f"{where} loss",
        *([metric] if with_metric else []),
        "FLOPs of its model",
        "time",
    )
    return text_table(head, [_row(each, with_metric) for each in found.trials], right=range(1, len(head)))


def _row(trial: Trial, with_metric: bool) -> tuple[str, ...]:
    metric = () if not with_metric else ("" if trial.metric is None else f"{trial.metric:.4f}",)
    sizes = f"{trial.size:.2f} of dense", f"{trial.seconds:.0f} s"
    loss = f"{trial.loss:.4f}" if math.isfinite(trial.loss) else "diverged"
    return trial.way, f"{trial.steps}", f"{trial.compute:.0f} dense steps", loss, *metric, *sizes


def verdict(found: Pilot, net: nn.Module, file: ModelFile, *, trained: bool = False) -> str:
    """Which way is the best, and how it stands beside the dense one. trained: whether the model began with weights,
    beside which a narrower one would say nothing.
    """
    from dynrank_fx.rewrite import plan_of

    best, dense, share = found.best, found.trials[0], plan_of(net).narrower
    said = f"best of the small models: {best.way}, {apart(best, dense)} the loss of dense"
    if not best.factored:
        said += "; for this model and this length of training, a narrower dense model is the better choice"
    elif not file.has("narrower") and share is not None and not trained:
        said += (
            f"; a dense model {share:.2f} times as wide has as many FLOPs: add narrower(share) to the model file to "
            "have it beside these"
        )
    return said


def apart(trial: Trial, other: Trial) -> str:
    """How far the loss of one is from that of another, in words that the other's follow."""
    gap = trial.loss - other.loss
    return f"{abs(gap):.4f} {'above' if gap > 0 else 'below'}"
