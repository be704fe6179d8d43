"""``dynrank-fx pilot``: which way to train is worth a long run, by short runs of equal compute."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dynrank_fx.text import json_text

from .options import (
    Option,
    Options,
    amp_of,
    amp_option,
    given_options,
    given_path,
    json_option,
    measure_option,
    plan_options,
    transformed,
    weights_option,
)
from .streams import echo
from .train import check_device
from .training import cost_by_option, factor_steps_option, known_decay
from .trials import begins_trained, table, tried, verdict

if TYPE_CHECKING:
    from torch import nn

    from dynrank_fx.training import Pilot, Settings

    from .modelfile import ModelFile


@click.command()
@click.argument("model_file", type=given_path)
@click.option(
    "--steps",
    type=click.IntRange(min=20),
    default=200,
    show_default=True,
    help="Optimizer steps of the dense model; every other way costs as much.",
)
@plan_options
@measure_option
@cost_by_option("What is the same for all")
@factor_steps_option
@weights_option
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, ...")
@amp_option
@click.option("--no-compile", is_flag=True, help="Run eagerly.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Of all random numbers.")
@json_option
def pilot(model_file: Path, steps: int, as_json: bool, **options: Option) -> None:
    """Train short runs of equal compute, and say which way is worth a long one. Nothing is written.

    All begin with the same weights and see the same data. In place of lr_scheduler() their learning rate has a warm-up
    and then half a cosine; without lr_scheduler() it stays as it is after the warm-up. Where the model file has
    narrower(share), which gives the model so many times as wide, the dense model of as many FLOPs as the factored one
    is among them. A long run may end otherwise: the longer the pilot, the surer it is. `train --pilot` goes on with the
    long run by itself.

    \b
    Example:
      dynrank-fx pilot samples/chars.py --steps 300
    """
    from dynrank_fx.randomness import seed_all
    from dynrank_fx.training import Task

    from .modelfile import load_model_file

    check_device(options["device"])
    file = load_model_file(model_file, options["weights"])
    file.require("train_data", "loss", command="pilot")
    seed_all(options["seed"])
    net = transformed(file, options)
    task = Task(file.train_data(), file.loss, file.inputs, file.eval_data(), file.metric, file.guard)
    found = tried(net, file, task, _settings(file, net, steps, options), options)
    if as_json:
        echo(json_text({"trials": [each.to_json() for each in found.trials], "best": found.best.way}))
        return
    echo(table(found, task, file.metric_name))
    echo(f"\n{verdict(found, net, file, trained=begins_trained(options))}")
    echo(_next(found, model_file, options))


def _settings(file: ModelFile, net: nn.Module, steps: int, options: Options) -> Settings:
    """As ``train`` trains where nothing else is asked for."""
    from dynrank_fx.training import CostBy, Settings, Steps, practical

    usual = practical()
    return Settings(
        steps=steps,
        device=options["device"],
        amp=amp_of(options["amp"]),
        compile=not options["no_compile"],
        **usual.choices
        | {
            "decay": known_decay(usual.decay, {"decay": None}, file.optimizer(net.parameters())),
            "factor_steps": Steps[(options["factor_steps"] or "each").upper()],
            "cost_by": CostBy[(options["cost_by"] or "flops").upper()],
        },
    )


def _next(found: Pilot, model_file: Path, options: Options) -> str:
    if not found.best.factored:
        return "next: train narrower(...) as you train any model, or try a larger --rank"
    auto = "--cost" in found.best.options
    given = _given(options if auto else {**options, "cost_by": None})
    command = shlex.join(["dynrank-fx", "train", str(model_file), *given, *found.best.options])
    longer = found.best.steps / found.trials[0].steps
    return f"next: {command}  ({longer:.1f} times as many steps as dense training cost as much)"


def _given(options: Options) -> list[str]:
    """What the command line gave that ``train`` takes as well; what is None is left out."""
    words = []
    for parameter in given_options(options):
        value = options[parameter.name or ""]
        for each in value if parameter.multiple else [] if value is None else [value]:
            words += [parameter.opts[0]] if each is True else [parameter.opts[0], str(each)]
    return words
