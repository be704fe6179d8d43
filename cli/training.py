"""How to train: the options of ``train`` that say so, and the preset and schedule they stand for."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from dynrank_fx.errors import DynrankWarning
from dynrank_fx.phase import Phase
from dynrank_fx.schedules import BY_NAME

from .options import Number, amp_of, compile_of, given_options, of_option

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from dynrank_fx.schedules import NamedSchedule, Schedule
    from dynrank_fx.training import Clock, Decay, Preset, Settings

    from .options import Options


def cost_by_option(what: str) -> Callable[[Callable[..., object]], Callable[..., object]]:
    """The option that says what costs are counted in. what: of which it is that."""
    help_text = f"{what}: FLOPs, or time as --measure has found it; by default flops."
    return click.option("--cost-by", type=click.Choice(["flops", "time"]), help=help_text)


factor_steps_option = click.option(
    "--factor-steps",
    type=click.Choice(["each", "product"]),
    help="By how much factors move; product: by less, the larger the other one is.",
)

_OPTIONS = (
    click.option(
        "--schedule",
        type=click.Choice(tuple(named.name for named in BY_NAME)),
        help="By default auto; aligned where --lr-milestones are given.",
    ),
    click.option(
        "--cost",
        type=Number(0, 1),
        help="For auto and --pilot: compute it may spend, as a share of dense training; by default 0.75.",
    ),
    cost_by_option("What --cost counts"),
    click.option(
        "--low", type=click.IntRange(min=0), default=2, show_default=True, help="LOW epochs in a row, for interleave."
    ),
    click.option(
        "--full", type=click.IntRange(min=0), default=1, show_default=True, help="FULL epochs in a row, for interleave."
    ),
    click.option(
        "--lr-milestones",
        metavar="E,E",
        help="Epochs (steps, with --steps) of the decays, for aligned; else the scheduler's.",
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
    factor_steps_option,
    click.option("--landing/--abrupt", default=None, help="Whether what a cut takes away decays before it."),
    click.option(
        "--rewarm", type=click.IntRange(min=0), metavar="STEPS", help="Re-warm the learning rate after a switch."
    ),
)


def training_options(command: Callable[..., object]) -> Callable[..., object]:
    """The options that decide how a net is trained."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def named_schedule(options: Options) -> NamedSchedule:
    """The schedule that the options ask for by its name, or by what only one takes."""
    name = options["schedule"] or ("auto" if options["lr_milestones"] is None else "aligned")
    return next(named for named in BY_NAME if named.name == name)


def how_to_train(options: Options) -> Preset:
    """The preset that goes with the schedule, but for what is asked for otherwise."""
    from dynrank_fx import training
    from dynrank_fx.phases import Carry
    from dynrank_fx.training import CostBy, Decay, Steps

    named = named_schedule(options)
    if options["cost"] is not None and "cost" not in named.takes:
        raise click.UsageError(f"--cost is the budget of auto, and says nothing to {named.name}")
    if options["cost_by"] is not None and "cost" not in named.takes:
        raise click.UsageError(f"--cost-by is of the budget of auto, and says nothing to {named.name}")
    for parameter in given_options(("low", "full", "lr_milestones")):
        if parameter.name not in named.takes:
            takes = next(each.name for each in BY_NAME if parameter.name in each.takes)
            raise click.UsageError(f"{parameter.opts[0]} is of --schedule {takes}, and says nothing to {named.name}")
    papers = {"paper-cifar10": training.paper_cifar10, "paper-cifar100": training.paper_cifar100}
    preset = papers.get(named.name, training.practical)()
    asked = {
        "carry": options["carry"] and Carry[options["carry"].upper()],
        "decay": options["decay"] and Decay[options["decay"].upper()],
        "factor_steps": options["factor_steps"] and Steps[options["factor_steps"].upper()],
        "rewarm": options["rewarm"],
        "random_init": options["init"] and options["init"] == "random",
        "landing": options["landing"],
        "cost_by": options["cost_by"] and CostBy[options["cost_by"].upper()],
    }
    return replace(preset, **{key: value for key, value in asked.items() if value is not None})


def settings_of(options: Options, epochs: int | None, optimizer: Optimizer, device: str) -> Settings:
    """How the run trains. epochs: of the run; None where it is counted in steps."""
    from dynrank_fx.training import Settings

    how = how_to_train(options)
    return Settings(
        epochs=epochs,
        steps=options.get("steps"),
        device=device,
        amp=amp_of(options["amp"]),
        compile=compile_of(options),
        activation_memory=options["activation_memory"],
        checkpoint_steps=options["checkpoint_steps"],
        accumulate=options["accumulate"],
        clip=options["clip"],
        **how.choices | {"decay": known_decay(how.decay, options, optimizer)},
    )


def known_decay(decay: Decay, options: Options, optimizer: Optimizer) -> Decay:
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


def schedule_of(options: Options, clock: Clock, lr_scheduler: LRScheduler | None, every_step: bool) -> Schedule:
    """The schedule that the options ask for. Its epochs are the ticks of the clock."""
    named = named_schedule(options)
    if named.name.startswith("paper") and not clock.by_epochs:
        raise click.UsageError(f"{named.name} names the epochs of its phases: give --epochs, more than one")
    last = {"svd": Phase.LOW, "adaptor": Phase.ADAPTOR, None: None}[options["deflate"]]
    if last is not None and "last" not in named.takes:
        raise click.UsageError(f"--deflate goes with aligned and paper-*, not with {named.name}")
    given = {name: options[name] for name in ("cost", "low", "full")} | {"epochs": clock.ticks, "last": last}
    if "lr_milestones" in named.takes:
        unit = "epochs" if clock.by_epochs else "steps"
        given["lr_milestones"] = _decays(options["lr_milestones"], clock, lr_scheduler, every_step)
        if not given["lr_milestones"]:
            raise click.UsageError(
                f"{named.name} goes by the decays of the learning rate: give their {unit} as --lr-milestones, or have "
                "lr_scheduler() return one with milestones"
            )
    with of_option("--schedule"):
        return named(given)


def _decays(given: str | None, clock: Clock, lr_scheduler: LRScheduler | None, every_step: bool) -> tuple[int, ...]:
    """The ticks of the decays; those of a run that is counted in steps are given in steps."""
    if given is None:
        milestones = sorted(getattr(lr_scheduler, "milestones", ()))
        in_steps = every_step
        if not every_step and not clock.by_epochs:
            milestones, in_steps = [each * (clock.per_epoch or 0) for each in milestones], True
    else:
        try:
            milestones = [int(part) for part in given.split(",")]
            if min(milestones) < 1:
                raise ValueError(given)
        except ValueError as error:
            raise click.BadParameter(
                f"{given!r} is no list of epochs like 8,10", param_hint="--lr-milestones"
            ) from error
        in_steps = not clock.by_epochs
    return tuple(each // clock.every for each in milestones) if in_steps and clock.every else tuple(milestones)
