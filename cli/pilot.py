"""``dynrank-fx pilot``: which way to train is worth a long run, by short runs of equal compute."""

from __future__ import annotations

import math
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dynrank_fx.errors import DynrankError, ModelFileError
from dynrank_fx.text import json_text, text_table

from .options import (
    Option,
    Options,
    amp_of,
    amp_option,
    given_options,
    given_path,
    json_option,
    plan_options,
    transformed,
    weights_option,
)
from .streams import echo
from .train import check_device

if TYPE_CHECKING:
    from torch import nn

    from dynrank_fx.plan import Plan
    from dynrank_fx.training import Pilot, Trial

    from .modelfile import ModelFile

_TRIES, _NEAR = 5, 0.05  # of the narrower width; how near the logarithm of its FLOPs shall come


@click.command()
@click.argument("model_file", type=given_path)
@click.option(
    "--steps",
    type=click.IntRange(min=20),
    default=200,
    show_default=True,
    help="Optimizer steps of the dense model; every other way takes as many FLOPs.",
)
@plan_options
@weights_option
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, ...")
@amp_option
@click.option("--no-compile", is_flag=True, help="Run eagerly.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Of all random numbers.")
@json_option
def pilot(model_file: Path, steps: int, as_json: bool, **options: Option) -> None:
    """Train short runs of equal compute, and say which way is worth a long one. Nothing is written.

    All begin with the same weights, see the same data, and have half a cosine of learning rate with a warm-up in place
    of lr_scheduler(). Where the model file has narrower(share), which gives the model so many times as wide, the dense
    model of as many FLOPs as the factored one is among them. A long run may end otherwise: the longer the pilot, the
    surer it is.

    \b
    Example:
      dynrank-fx pilot samples/chars.py --steps 300
    """
    from dynrank_fx.randomness import seed_all
    from dynrank_fx.rewrite import plan_of
    from dynrank_fx.training import Settings, Task
    from dynrank_fx.training import pilot as run_pilot

    from .modelfile import load_model_file

    check_device(options["device"])
    file = load_model_file(model_file, options["weights"])
    file.require("train_data", "loss", command="pilot")
    seed_all(options["seed"])
    net = transformed(file, options)
    share = plan_of(net).narrower
    # Beside a model that begins with trained weights it would begin with random ones.
    narrower = None if options["weights"] is not None else _narrower(file, options, plan_of(net), options["seed"])
    task = Task(file.train_data(), file.loss, file.inputs, file.eval_data(), file.metric, file.guard)
    settings = Settings(
        steps=steps, device=options["device"], amp=amp_of(options["amp"]), compile=not options["no_compile"]
    )
    found = run_pilot(
        net,
        task,
        file.optimizer,
        settings,
        narrower=narrower,
        seed=options["seed"],
        begun=lambda way, count: echo(f"{way}: {count} steps", err=True),
    )
    if as_json:
        echo(json_text({"trials": [asdict(each) for each in found.trials], "best": found.best.way}))
        return
    echo(_table(found, file.metric_name, held_out=task.eval_data is not None))
    echo(_verdict(found, share, narrower is not None))
    echo(_next(found, model_file, options))


def _narrower(file: ModelFile, options: Options, plan: Plan, seed: int) -> nn.Module | None:
    """The narrower model as a net, so that it is trained and counted as the others are. Its share of the width is
    sought until its FLOPs are those of LOW, as near as its widths allow.
    """
    from dynrank_fx.randomness import seed_all
    from dynrank_fx.rewrite import plan_of

    share, wanted = plan.narrower, plan.low_flops
    if share is None or not wanted:
        return None
    tried: dict[float, nn.Module] = {}
    for _ in range(_TRIES):
        seed_all(seed)
        model = file.narrower(share)
        if model is None:
            return None
        try:  # a plan is of the wider one
            net = transformed(file, options | {"plan_file": None}, model=model)
        except DynrankError as error:
            raise ModelFileError(f"{file.path.name}: narrower({share:.3g}) is of another kind: {error}") from error
        over = (plan_of(net).total_flops or 1) / wanted
        tried[abs(math.log(over))] = net
        if min(tried) < _NEAR:
            break
        share = min(1.0, share / math.sqrt(over))
    return tried[min(tried)]


def _table(found: Pilot, metric: str, *, held_out: bool) -> str:
    with_metric = any(each.metric is not None for each in found.trials)
    where = "held-out" if held_out else "training"
    head = (
        "way",
        "steps",
        "compute",
        f"{where} loss",
        *([metric] if with_metric else []),
        "FLOPs of its model",
        "time",
    )
    rows = [_row(each, with_metric) for each in found.trials]
    return text_table(head, rows, right=range(1, len(head)))


def _row(trial: Trial, with_metric: bool) -> tuple[str, ...]:
    metric = () if not with_metric else ("" if trial.metric is None else f"{trial.metric:.4f}",)
    sizes = f"{trial.size:.2f} of dense", f"{trial.seconds:.0f} s"
    return trial.way, f"{trial.steps}", f"{trial.compute:.0f} dense steps", f"{trial.loss:.4f}", *metric, *sizes


def _verdict(found: Pilot, share: float | None, with_narrower: bool) -> str:
    best, dense = found.best, found.trials[0]
    gap = best.loss - dense.loss
    said = f"\nbest of the small models: {best.way}, {abs(gap):.4f} {'above' if gap > 0 else 'below'} the loss of dense"
    if not best.options:
        said += "; for this model and this length of training, a narrower dense model is the better choice"
    elif not with_narrower and share is not None:
        said += (
            f"; a dense model {share:.2f} times as wide has as many FLOPs: add narrower(share) to the model file to "
            "have it beside these"
        )
    return said


def _next(found: Pilot, model_file: Path, options: Options) -> str:
    if not found.best.options:
        return "next: train narrower(...) as you train any model, or try a larger --rank"
    command = shlex.join(["dynrank-fx", "train", str(model_file), *_given(options), *found.best.options])
    longer = found.best.steps / found.trials[0].steps
    return f"next: {command}  ({longer:.1f} times as many steps as dense training take as much compute)"


def _given(options: Options) -> list[str]:
    """What the command line gave that ``train`` takes as well."""
    words = []
    for parameter in given_options(options):
        value = options[parameter.name or ""]
        for each in value if parameter.multiple else [value]:
            words += [parameter.opts[0]] if each is True else [parameter.opts[0], str(each)]
    return words
