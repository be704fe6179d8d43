"""``train --pilot``: how a run trains, and for how long, is decided by short runs of equal compute before it."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING

import click

from dynrank_fx.aliases import JsonObject
from dynrank_fx.errors import DynrankWarning, ModelFileError, StoreError
from dynrank_fx.text import counted, rounded

from .streams import echo
from .trials import apart, begins_trained, table, tried, verdict

if TYPE_CHECKING:
    from torch import nn

    from dynrank_fx.training import Pilot, Settings, Task, Trial

    from .modelfile import ModelFile
    from .options import Options

COST = 0.75  # of the dense training of so many epochs, as for auto itself

pilot_option = click.option(
    "--pilot",
    type=click.IntRange(min=20),
    metavar="STEPS",
    help="First train short runs that cost so many dense steps, as `pilot` does; then train in the best factored way, "
    "for as long as --cost pays.",
)


def check_pilot_options(options: Options, schedule: str, processes: int) -> None:
    """Refuse what leaves a pilot nothing to decide. schedule: the name of that which the options ask for. processes:
    that would begin the run.
    """
    if options["pilot"] is None:
        return
    if schedule != "auto":
        flag = "--schedule" if options["schedule"] is not None else "--lr-milestones"
        raise click.UsageError(
            f"--pilot decides between LOW alone and auto, and {flag} asks for {schedule}: leave one of them out"
        )
    if options["deflate"] is not None:
        raise click.UsageError("--deflate goes with aligned and paper-*, not with --pilot: leave one of them out")
    if processes > 1:
        raise click.UsageError(
            "--pilot is the work of one process, whose decision the others would not have: ask `dynrank-fx pilot`, and "
            "give what it finds"
        )


def check_pilot_file(file: ModelFile, options: Options) -> None:
    """Refuse a learning rate that could not follow the length that is found."""
    if options["pilot"] is None or not file.has("lr_scheduler"):
        return
    if options["steps"] is not None:
        raise ModelFileError(
            f"{file.path.name} has lr_scheduler(), which is not told how many steps --pilot finds: give the length as "
            "--epochs, and let lr_scheduler() go by the file's `epochs`, or take lr_scheduler() out"
        )
    if file.epochs is None:
        raise ModelFileError(
            f"{file.path.name} has lr_scheduler() and no `epochs`, by which that could follow the length that --pilot "
            "finds: add a line such as `epochs = 10` to the file, and let lr_scheduler() go by it"
        )


def decide(
    net: nn.Module, file: ModelFile, task: Task, settings: Settings, options: Options, *, as_json: bool
) -> JsonObject:
    """What the pilot of a new run finds, for its run.json, all of which is told: the trials, the options that then
    count (``decided_in``), and a line that says why.

    settings: as the run itself would train.
    """
    from dataclasses import replace

    short = replace(settings, epochs=None, steps=options["pilot"], checkpoint_steps=None)
    found = tried(net, file, task, short, options)
    best, unit = found.best_factored, "epoch" if settings.steps is None else "step"
    length = settings.epochs or settings.steps or 0
    budget = (COST if options["cost"] is None else options["cost"]) * length
    count = max(1, round(budget / best.cost))
    line = _line(found, best, counted(count, unit), count * best.cost, options["cost_by"])
    judged = verdict(found, net, file, trained=begins_trained(options))
    for text in (table(found, task, file.metric_name), f"\n{judged}", f"now training: {line}"):
        echo(text, err=as_json)
    _warn_of_narrower(found, best)
    return {
        "trials": [each.to_json() for each in found.trials],
        "decided": _options(best, unit, count, options),
        "said": line,
    }


def _options(best: Trial, unit: str, count: int, given: Options) -> JsonObject:
    auto = "--cost" in best.options
    return {
        "schedule": "auto" if auto else "low",
        "cost": best.cost if auto else None,
        "cost_by": given["cost_by"] if auto else None,
        f"{unit}s": count,
    }


def _line(found: Pilot, best: Trial, length: str, spent: float, cost_by: str | None) -> str:
    """What is trained, and what may be expected of it."""
    others = [each for each in found.trials if each.factored and each is not best and math.isfinite(each.loss)]
    cost = f"{'take as long' if cost_by == 'time' else 'cost as much'} as {rounded(spent, 3):g} dense ones"
    if not others:
        return f"{best.way} for {length}, which {cost}"
    other = min(others, key=lambda each: each.loss)
    level = round(best.loss, 4) == round(other.loss, 4)
    beside = f"{'' if level else apart(best, other) + ' '}that of {other.way}"
    return f"{best.way} for {length}, which {cost}; in the pilot its loss was {beside}"


def _warn_of_narrower(found: Pilot, best: Trial) -> None:
    if not found.best.factored:
        warnings.warn(
            f"the narrower dense model had a loss of {found.best.loss:.4f} in the pilot, and {best.way} one of "
            f"{best.loss:.4f}, at equal cost: this run trains factors all the same, as was asked for",
            DynrankWarning,
            stacklevel=2,
        )


def decided_in(noted: JsonObject) -> JsonObject:
    """The options that a pilot decided for the run with this run.json; none where it had none. Raises StoreError."""
    decided = (noted.get("pilot") or {}).get("decided", {})
    if not isinstance(decided, dict):
        raise StoreError(f"run.json is damaged: its pilot decided {decided!r}; put an earlier copy back")
    return decided
