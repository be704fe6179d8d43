"""``dynrank-fx train``: train by a schedule with checkpoints, stop on Ctrl-C, and go on as if nothing had happened."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dynrank_fx.errors import DynrankWarning, ModelFileError, StoreError

from .options import PLAN_OPTIONS, plan_options, refuse_beside, transformed
from .runs import RUN_FILE, read_run_file, write_run_file

if TYPE_CHECKING:
    from torch import nn

    from dynrank_fx.decay import Decay
    from dynrank_fx.phase import Schedule
    from dynrank_fx.presets import Preset
    from dynrank_fx.train import Run, Settings, Task, Watcher

    from .modelfile import ModelFile

_SCHEDULES = ("auto", "aligned", "interleave", "low", "full", "paper-cifar10", "paper-cifar100")


@click.command()
@click.argument("model_file", type=Path)
@plan_options
@click.option("--from", "start", type=Path, metavar="FOLDER", help="Start from a folder that `transform` wrote.")
@click.option("--out", type=Path, metavar="FOLDER", help="The run; by default <model>-run.")
@click.option("--epochs", type=click.IntRange(min=1), help="By default `epochs` of the model file, or 10.")
@click.option(
    "--schedule", type=click.Choice(_SCHEDULES), help="By default auto; aligned where --lr-milestones are given."
)
@click.option(
    "--cost",
    type=click.FloatRange(0, 1),
    default=0.75,
    show_default=True,
    help="For auto: compute it may spend, as a share of dense training.",
)
@click.option("--low", type=int, default=2, show_default=True, help="LOW epochs in a row, for interleave.")
@click.option("--full", type=int, default=1, show_default=True, help="FULL epochs in a row, for interleave.")
@click.option("--lr-milestones", metavar="E,E", help="Epochs of the decays, for aligned; by default the scheduler's.")
@click.option(
    "--deflate",
    type=click.Choice(["svd", "adaptor"]),
    help="What follows FULL in aligned and paper-*: truncated factors, or the paper's branch beside the frozen weight.",
)
@click.option("--init", type=click.Choice(["spectral", "random"]), help="Of factors that training starts with.")
@click.option("--carry", type=click.Choice(["move", "reset"]), help="Optimizer state at a switch.")
@click.option("--decay", type=click.Choice(["product", "halved", "each"]), help="What weight decay does to factors.")
@click.option("--landing/--abrupt", default=None, help="Whether what a cut takes away decays before it.")
@click.option("--rewarm", type=click.IntRange(min=0), metavar="STEPS", help="Re-warm the learning rate after a switch.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, ...")
@click.option("--amp", type=click.Choice(["bf16"]), help="Autocast to bfloat16.")
@click.option("--no-compile", is_flag=True, help="Run eagerly.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True)
@click.option("--checkpoint-steps", type=click.IntRange(min=1), metavar="N", help="Also save every N steps.")
@click.option("--tensorboard", is_flag=True, help="Also write the epochs' records for TensorBoard, into --out.")
@click.option("--resume", is_flag=True, help="Go on with the run in --out.")
@click.pass_context
def train(ctx: click.Context, model_file: Path, out: Path | None, resume: bool, **options: Any) -> None:
    """Train through LOW and FULL phases; a checkpoint after every epoch.

    Ctrl-C saves between two steps and says how to go on. A resumed run ends bitwise equal to one that was never
    stopped (on the CPU, with the same number of threads).

    \b
    Example:
      dynrank-fx train samples/digits.py --rank 0.25 --schedule interleave --out digits-run
    """
    folder = out or Path(f"{model_file.stem}-run")
    if resume:
        options = _options_of(ctx, folder, options)
    elif (folder / RUN_FILE).exists():
        raise StoreError(f"{folder} holds a run already: add --resume to go on with it, or choose another --out")

    from dynrank_fx.checkpoint import how_in, rebuilt
    from dynrank_fx.randomness import seed_all
    from dynrank_fx.runfile import plan_in, read_run, restore_run_, save_run
    from dynrank_fx.train import fit
    from dynrank_fx.transition import phases_of

    from .modelfile import load_model_file

    _check_device(options["device"])
    seed_all(options["seed"])
    file = load_model_file(model_file)
    file.require("train_data", "loss")
    if resume:
        tensors, info = read_run(folder)
        # As it was planned then, whatever the plan's file or the model's first weights have become.
        net = rebuilt(file.model(), plan_in(info), file.example_inputs(), how_in(info))
        run, task, settings = _set_up(file, options, net)
        restore_run_(run, tensors, info)
    else:
        run, task, settings = _set_up(file, options, _net(file, options))
        _make_folder(folder)
        save_run(run, folder)
        write_run_file(folder, model_file, _plain(options))
    if run.epoch >= settings.epochs:
        click.echo(f"{folder} has all its {settings.epochs} epochs already")
        return
    click.echo(f"{len(phases_of(run.net))} sites; schedule {run.schedule}; {settings.epochs} epochs", err=True)
    bar = _bar(task, settings)
    watcher = _with_tensorboard(bar, folder) if options["tensorboard"] else bar
    with _stop_signals() as stopped:
        finished = fit(
            run, task, settings, save=lambda r: save_run(r, folder), watcher=watcher, should_stop=lambda: bool(stopped)
        )
    bar.close()
    if finished:
        then = shlex.join(["dynrank-fx", "export", str(folder), "-o", f"{model_file.stem}.onnx"])
        click.echo(f"wrote {folder}/; next: {then}", err=True)
        return
    then = shlex.join(["dynrank-fx", "train", str(model_file), "--out", str(folder), "--resume"])
    click.echo(
        f"stopped in epoch {run.epoch + 1} of {settings.epochs} after {run.step} steps, and saved; go on with: {then}",
        err=True,
    )
    sys.exit(128 + stopped[0])


def _options_of(ctx: click.Context, folder: Path, given: dict[str, Any]) -> dict[str, Any]:
    """The options that the run was started with. Raises StoreError where one is given again with another value."""
    started = read_run_file(folder)["options"]
    for name, value in _plain(given).items():
        said = ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
        if said and value != started.get(name):
            flag = "--" + name.removesuffix("_file").replace("_", "-").replace("start", "from")
            before = started.get(name)
            then = f"without {flag}" if before in (None, []) or before is False else f"with {flag} {before}"
            raise StoreError(f"the run in {folder} was started {then}: leave {flag} out, or start another run")
    return started


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    """As they come back from JSON."""
    return {k: str(v) if isinstance(v, Path) else list(v) if isinstance(v, tuple) else v for k, v in options.items()}


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"{folder} could not be made ({error.strerror}); choose another --out") from error


def _set_up(file: ModelFile, options: dict[str, Any], net: nn.Module) -> tuple[Run, Task, Settings]:
    """The run as at its first step: the same on a resume, before the checkpoint is taken over."""
    from dynrank_fx.optim import Carry
    from dynrank_fx.randomness import generators_of
    from dynrank_fx.train import Run, Settings, Task

    preset = _preset(options)
    net = net.to(options["device"]).train()
    optimizer = file.optimizer(net.parameters())
    lr_scheduler = file.lr_scheduler(optimizer)
    settings = Settings(
        epochs=options["epochs"] or file.epochs or 10,
        device=options["device"],
        amp=options["amp"] == "bf16",
        compile=not options["no_compile"],
        carry=Carry[options["carry"].upper()] if options["carry"] else preset.carry,
        decay=_decay(options["decay"], preset.decay, optimizer),
        rewarm=preset.rewarm if options["rewarm"] is None else options["rewarm"],
        landing=preset.landing if options["landing"] is None else options["landing"],
        random_init=preset.random_init if options["init"] is None else options["init"] == "random",
        checkpoint_steps=options["checkpoint_steps"],
    )
    task = Task(
        train_data=file.train_data(),
        loss=file.loss,
        inputs=file.inputs,
        eval_data=file.eval_data(),
        metric=file.metric,
    )
    schedule = _schedule(options, settings.epochs, lr_scheduler, preset.schedule)
    generators = generators_of(task.train_data, task.eval_data)
    return Run(net, optimizer, schedule, lr_scheduler, generators=generators), task, settings


def _net(file: ModelFile, options: dict[str, Any]) -> nn.Module:
    if options["start"] is not None:
        from dynrank_fx.checkpoint import load

        refuse_beside("--from", options)
        return load(options["start"], file.model(), file.example_inputs())
    chosen = {name: options[name] for name in PLAN_OPTIONS}
    if not any(chosen[name] for name in ("rank", "energy", "plan_file")):
        chosen["policy"] = _preset(options).rank
    return transformed(file, **chosen)


def _check_device(device: str) -> None:
    import torch

    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise ModelFileError(f"the device {device!r} cannot be used here ({first}); give --device cpu") from error


def _preset(options: dict[str, Any]) -> Preset:
    from dynrank_fx import presets

    name = options["schedule"]
    if name in ("paper-cifar10", "paper-cifar100"):
        return presets.paper_cifar10() if name == "paper-cifar10" else presets.paper_cifar100()
    return presets.practical(options["cost"])


def _decay(name: str | None, default: Decay, optimizer: Any) -> Decay:
    """What was asked for; or the preset's, where it is known how the optimizer decays weights."""
    from dynrank_fx.decay import Decay, decays_in_a_known_way

    if name is not None:
        return Decay[name.upper()]
    if default is Decay.EACH or decays_in_a_known_way(optimizer):
        return default
    warnings.warn(
        f"how {type(optimizer).__name__} decays weights is not known: it decays each factor by itself",
        DynrankWarning,
        stacklevel=2,
    )
    return Decay.EACH


def _schedule(options: dict[str, Any], epochs: int, lr_scheduler: Any, preset: Schedule) -> Schedule:
    from dynrank_fx import schedules
    from dynrank_fx.phase import Phase

    given = options["deflate"]
    name = options["schedule"] or ("aligned" if options["lr_milestones"] else "auto")
    last = {"svd": Phase.LOW, "adaptor": Phase.ADAPTOR, None: None}[given]
    if last is not None and not name.startswith(("aligned", "paper")):
        raise click.UsageError(f"--deflate goes with aligned and paper-*, not with {name}")
    match name:
        case "auto":
            return preset
        case "aligned":
            return schedules.aligned(epochs, _decays(options["lr_milestones"], lr_scheduler), last or Phase.LOW)
        case "interleave":
            return schedules.interleave(low=options["low"], full=options["full"])
        case "paper-cifar10":
            return schedules.paper_cifar10(last or Phase.ADAPTOR)
        case "paper-cifar100":
            return schedules.paper_cifar100(last or Phase.ADAPTOR)
        case phase:
            return schedules.always(Phase[phase.upper()])


def _decays(given: str | None, lr_scheduler: Any) -> tuple[int, ...]:
    if given is None:
        return tuple(sorted(getattr(lr_scheduler, "milestones", ())))
    try:
        return tuple(int(part) for part in given.split(","))
    except ValueError as error:
        raise click.BadParameter(f"{given!r} is no list of epochs like 8,10", param_hint="--lr-milestones") from error


def _bar(task: Task, settings: Settings) -> Any:
    from dynrank_fx.progress import Bar

    try:
        steps = len(task.train_data)  # type: ignore[arg-type]
    except TypeError:
        steps = None
    return Bar(settings.epochs, steps)


def _with_tensorboard(bar: Watcher, folder: Path) -> Watcher:
    from dynrank_fx.train import Watchers

    try:
        from dynrank_fx.integrations.tensorboard import TensorBoard
    except ImportError as error:
        raise ModelFileError("--tensorboard needs TensorBoard: pip install tensorboard") from error
    return Watchers(bar, TensorBoard(folder / "tensorboard"))


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """A list that Ctrl-C or a termination puts its signal number in; a second Ctrl-C interrupts at once."""
    stopped: list[int] = []
    process = os.getpid()

    def note(number: int, frame: Any) -> None:
        if os.getpid() != process:  # a data loader's worker: the last step may wait for it, so only the second counts
            if stopped:
                os._exit(128 + number)
            stopped.append(number)
            return
        if stopped:
            raise KeyboardInterrupt
        stopped.append(number)
        click.echo("\nstopping after this step ...", err=True)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
