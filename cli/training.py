"""How to train: the options of ``train`` that say so, and the preset and schedule they stand for."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from dynrank_fx.errors import DynrankWarning

if TYPE_CHECKING:
    from dynrank_fx.schedules import Schedule
    from dynrank_fx.training import Decay, Preset

_SCHEDULES = ("auto", "aligned", "interleave", "low", "full", "paper-cifar10", "paper-cifar100")
_OPTIONS = (
    click.option(
        "--schedule", type=click.Choice(_SCHEDULES), help="By default auto; aligned where --lr-milestones are given."
    ),
    click.option(
        "--cost",
        type=click.FloatRange(0, 1),
        help="For auto: compute it may spend, as a share of dense training; by default 0.75.",
    ),
    click.option("--low", type=int, default=2, show_default=True, help="LOW epochs in a row, for interleave."),
    click.option("--full", type=int, default=1, show_default=True, help="FULL epochs in a row, for interleave."),
    click.option(
        "--lr-milestones", metavar="E,E", help="Epochs of the decays, for aligned; by default the scheduler's."
    ),
    click.option(
        "--deflate",
        type=click.Choice(["svd", "adaptor"]),
        help="What follows FULL in aligned and paper-*: truncated factors, or the paper's branch beside the weight.",
    ),
    click.option("--init", type=click.Choice(["spectral", "random"]), help="Of factors that training starts with."),
    click.option("--carry", type=click.Choice(["move", "reset"]), help="Optimizer state at a switch."),
    click.option(
        "--decay", type=click.Choice(["product", "halved", "each"]), help="What weight decay does to factors."
    ),
    click.option("--landing/--abrupt", default=None, help="Whether what a cut takes away decays before it."),
    click.option(
        "--rewarm", type=click.IntRange(min=0), metavar="STEPS", help="Re-warm the learning rate after a switch."
    ),
)


def training_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that decide how a net is trained."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def _name(options: dict[str, Any]) -> str:
    return options["schedule"] or ("aligned" if options["lr_milestones"] else "auto")


def how_to_train(options: dict[str, Any]) -> Preset:
    """The preset that the schedule goes with, but for what is asked for otherwise."""
    from dynrank_fx import training
    from dynrank_fx.phases import Carry
    from dynrank_fx.training import Decay

    name, cost = _name(options), options["cost"]
    if cost is not None and name != "auto":
        raise click.UsageError(f"--cost is the budget of auto, and says nothing to {name}")
    match name:
        case "paper-cifar10":
            preset = training.paper_cifar10()
        case "paper-cifar100":
            preset = training.paper_cifar100()
        case _:
            preset = training.practical() if cost is None else training.practical(cost)
    asked = {
        "carry": options["carry"] and Carry[options["carry"].upper()],
        "decay": options["decay"] and Decay[options["decay"].upper()],
        "rewarm": options["rewarm"],
        "random_init": options["init"] and options["init"] == "random",
        "landing": options["landing"],
    }
    return replace(preset, **{key: value for key, value in asked.items() if value is not None})


def known_decay(decay: Decay, options: dict[str, Any], optimizer: Any) -> Decay:
    """The decay itself; where nobody asked for it and how the optimizer decays weights is not known, none of ours."""
    from dynrank_fx.training import Decay, decays_in_a_known_way

    if options["decay"] is not None or decay is Decay.EACH or decays_in_a_known_way(optimizer):
        return decay
    warnings.warn(
        f"how {type(optimizer).__name__} decays weights is not known: it decays each factor by itself",
        DynrankWarning,
        stacklevel=2,
    )
    return Decay.EACH


def schedule_of(options: dict[str, Any], epochs: int, lr_scheduler: Any) -> Schedule:
    """The schedule that the options ask for."""
    from dynrank_fx import schedules
    from dynrank_fx.phase import Phase

    name = _name(options)
    last = {"svd": Phase.LOW, "adaptor": Phase.ADAPTOR, None: None}[options["deflate"]]
    if last is not None and not name.startswith(("aligned", "paper")):
        raise click.UsageError(f"--deflate goes with aligned and paper-*, not with {name}")
    match name:
        case "auto" | "paper-cifar10" | "paper-cifar100":
            schedule = how_to_train(options).schedule
            return schedule if last is None else replace(schedule, last=last)  # type: ignore[type-var]
        case "aligned":
            return schedules.aligned(epochs, _decays(options["lr_milestones"], lr_scheduler), last or Phase.LOW)
        case "interleave":
            return schedules.interleave(low=options["low"], full=options["full"])
        case phase:
            return schedules.always(Phase[phase.upper()])


def _decays(given: str | None, lr_scheduler: Any) -> tuple[int, ...]:
    if given is None:
        return tuple(sorted(getattr(lr_scheduler, "milestones", ())))
    try:
        return tuple(int(part) for part in given.split(","))
    except ValueError as error:
        raise click.BadParameter(f"{given!r} is no list of epochs like 8,10", param_hint="--lr-milestones") from error
