"""``dynrank-fx train``: train by a schedule with checkpoints, stop on Ctrl-C, and go on as if nothing had happened."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dynrank_fx.aliases import Batch, Json, JsonObject
from dynrank_fx.errors import ModelFileError, StoreError, first_line
from dynrank_fx.files import check_folder_place, only_one
from dynrank_fx.text import counted, json_text

from .decided import check_pilot_file, check_pilot_options, decide, decided_in, pilot_option
from .options import (
    Number,
    Option,
    Options,
    amp_option,
    check_plan_options,
    compile_option,
    given_path,
    json_option,
    measure_option,
    plan_options,
    refuse_beside,
    transformed,
    weights_option,
)
from .runs import RUN_FILE, read_own_run, read_run_file, set_epochs_of_run_, write_run_file
from .several import Launched, OfAnotherError, device_of, launched, say, together, wish_to_stop
from .stopping import stop_signals
from .streams import echo
from .training import how_to_train, named_schedule, schedule_of, settings_of, training_options

if TYPE_CHECKING:
    from torch import nn

    from dynrank_fx.processes import Processes
    from dynrank_fx.schedules import EpochRecord
    from dynrank_fx.training import Clock, Run, Settings, Task, Watcher

    from .modelfile import ModelFile


@click.command()
@click.argument("model_file", type=given_path)
@plan_options
@measure_option
@weights_option
@click.option("--from", "start", type=given_path, metavar="FOLDER", help="Start from a folder that `transform` wrote.")
@click.option("--out", type=given_path, metavar="FOLDER", help="The run; by default <model>-run.")
@click.option("--epochs", type=click.IntRange(min=1), help="By default `epochs` of the model file, or 10.")
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    help="Optimizer steps in place of --epochs, as for a stream: the schedule decides 20 times.",
)
@training_options
@pilot_option
@click.option("--device", help="cpu, cuda, cuda:1, ...; by default cpu, or under torchrun a GPU for each, if they do.")
@amp_option
@click.option(
    "--accumulate", type=click.IntRange(min=1), default=1, metavar="N", help="Batches of a step; 1 by default."
)
@click.option(
    "--clip", type=Number(0, min_open=True), metavar="NORM", help="Clip the gradients of a step to this norm."
)
@click.option("--workers", type=click.IntRange(min=0), metavar="N", help="Processes of train_data()'s DataLoader.")
@click.option("--fsdp", is_flag=True, help="Each process of torchrun holds a part of every parameter (FSDP2); eager.")
@compile_option
@click.option("--no-compile", is_flag=True, help="Run eagerly.")
@click.option(
    "--activation-memory",
    type=click.FloatRange(0, 1),
    metavar="SHARE",
    help="Keep so much of what torch.compile keeps for the backward pass, and compute the rest again.",
)
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Of all random numbers.")
@click.option(
    "--checkpoint-steps", type=click.IntRange(min=1), metavar="N", help="Also save every N steps of the optimizer."
)
@click.option("--tensorboard", is_flag=True, help="Also write the epochs' records for TensorBoard, into --out.")
@click.option("--resume", is_flag=True, help="Go on with the run in --out.")
@json_option
@click.pass_context
def train(
    ctx: click.Context, /, model_file: Path, out: Path | None, resume: bool, as_json: bool, **options: Option
) -> None:
    """Train through LOW and FULL phases; a checkpoint after every epoch.

    Ctrl-C saves between two steps and says how to go on. A resumed run ends bitwise equal to one that was never
    stopped (on the CPU, with the same number of threads). Started by torchrun, several processes train together, each
    on its share of the data; after a restart of theirs they go on from the last checkpoint.

    Where the model file has `epochs`, its functions see the number of --epochs there, or that which --pilot found.

    \b
    Example:
      dynrank-fx train samples/digits.py --rank 0.25 --schedule interleave --out digits-run
      torchrun --nproc-per-node 4 -m dynrank_fx.cli train samples/digits.py --out digits-run
    """
    check_plan_options(options)
    if options.get("steps") and options["epochs"]:
        raise click.UsageError("--steps is the length of a run in place of --epochs: give one of them")
    if options["fsdp"] and launched() is None:
        raise click.UsageError("--fsdp shares the parameters among processes: start them by torchrun")
    folder, launch = out or Path(f"{model_file.stem}-run"), launched()
    beginning = 1 if launch is None or resume else launch.count
    check_pilot_options(options, named_schedule(options).name, beginning)
    processes = ctx.with_resource(together(launch))
    # Only the first looks at the folder, which the others may not even have.
    noted, options = processes.from_one(
        0, lambda: _opened(ctx, folder, resume, options, model_file, launch), OfAnotherError, "opening the run"
    )

    from dynrank_fx.phases import phases_of
    from dynrank_fx.randomness import seed_all
    from dynrank_fx.training import Bar, Watcher, clock_of_run, fit, save_run, shard_

    from .modelfile import load_model_file

    if options["measure"] and processes.count > 1:
        raise click.UsageError(
            "--measure is the work of one process, whose plan the others would not have: make it by "
            "`dynrank-fx transform --measure`, and give its folder as --from"
        )
    device = device_of(options["device"], launch)
    check_device(device)
    seed_all(options["seed"])
    # On a resume the run's own weights count.
    file = load_model_file(model_file, options["weights"] if noted is None else None)
    file.require("train_data", "loss")
    _refuse_other_files(processes, model_file)
    if noted is not None:
        run, task, settings = _resumed(processes, file, folder, options, device, noted)
    else:
        run, task, settings = _begun(ctx, processes, file, folder, options, device, as_json)
    if options["fsdp"]:
        shard_(run.net, run.optimizer, device)
    clock = clock_of_run(run, task, settings)
    length = counted(clock.ticks, clock.unit)
    if run.epoch >= clock.ticks:
        if processes.first:
            echo(f"{folder} has its {length} already", err=as_json)
            _print_result(run, clock, folder, as_json)
        return
    if not clock.by_epochs:
        whole = counted(clock.steps or 0, "step") if clock.parts == 1 else counted(clock.ticks // clock.parts, "epoch")
        length = f"{whole} in {length}"
    trained_by = f"; {processes.count} processes, {device.partition(':')[0]}" if processes.count > 1 else ""
    say(f"{counted(len(phases_of(run.net)), 'site')}; schedule {run.schedule}; {length}{trained_by}")
    if (changed := task.train_share.other_than(run.dealt)) is not None:
        say(changed)
    bar = Bar(clock.ticks, clock.every and clock.every * settings.accumulate, file.metric_name, unit=clock.unit)
    watcher = _with_tensorboard(bar, folder) if options["tensorboard"] and processes.first else bar
    with stop_signals(passed_on=launch is not None) as stopped:
        finished = fit(
            run,
            task,
            settings,
            save=lambda r: save_run(r, folder),
            watcher=watcher if processes.first else Watcher(),
            should_stop=lambda: wish_to_stop(stopped, launch),
        )
    bar.close()
    if processes.first:
        _print_result(run, clock, folder, as_json)
    if finished:
        for last in run.history[-1:]:
            say(_cost(last, run, (settings.epochs, settings.steps) if options["pilot"] else None))
        then = shlex.join(["dynrank-fx", "export", str(folder), "-o", f"{model_file.stem}.onnx"])
        say(f"wrote {folder}/; next: {then}")
        return
    again = ["train", str(model_file), "--out", str(folder), *(["--fsdp"] if options["fsdp"] else []), "--resume"]
    then = shlex.join([*_started_by(launch), *again])
    say(
        f"stopped in {clock.unit} {run.epoch + 1} of {clock.ticks} after {counted(run.step, 'step')}, and saved; "
        f"go on with: {then}"
    )
    ctx.exit(128 + processes.most(wish_to_stop(stopped, launch)))


def _cost(last: EpochRecord, run: Run, decided: tuple[int | None, int | None] | None) -> str:
    """What the run cost, as a share of a dense one of as many epochs. decided: epochs or steps that a pilot has given
    it, which say how many dense ones that is.
    """
    from dynrank_fx.rewrite import plan_of

    counted, ticks = "FLOPs" if plan_of(run.net).total_flops else "parameters", len(run.history)
    in_time = "" if last.spent_time is None else f", {last.spent_time / ticks:.2f} of its time"
    epochs, steps = decided or (None, None)
    length = epochs or steps
    as_dense = (
        f", as many as {last.spent / ticks * length:.3g} dense {'epochs' if epochs else 'steps'}" if length else ""
    )
    return f"it cost {last.spent / ticks:.2f} of the {counted} of dense training{as_dense}{in_time}"


def _opened(
    ctx: click.Context, folder: Path, resume: bool, options: Options, model_file: Path, launch: Launched | None
) -> tuple[JsonObject | None, Options]:
    """The run.json of the run to go on with, if there is one, and the options, once it is this process's alone."""
    check_folder_place(folder)
    resume = resume or _is_this_one(folder, options, model_file, launch)
    if not resume:
        _refuse_run(folder)
        return None, options
    ctx.with_resource(only_one(folder))
    noted = read_run_file(folder)
    return noted, _options_of(ctx, folder, noted, options)


def _is_this_one(folder: Path, options: Options, model_file: Path, launch: Launched | None) -> bool:
    """Whether torchrun has started the processes anew, and the run in the folder is the one that they began."""
    if launch is None or not launch.restarts or not (folder / RUN_FILE).exists():
        return False
    noted = read_run_file(folder)
    same = noted["options"] == _plain(options) and noted["model_file"] == str(model_file.resolve())
    return same and noted.get("job") == launch.job


def _resumed(
    processes: Processes, file: ModelFile, folder: Path, options: Options, device: str, noted: JsonObject
) -> tuple[Run, Task, Settings]:
    """The run in the folder, as planned then, whatever the plan's file or the model's first weights have become. noted:
    its run.json.
    """
    from dynrank_fx.phases import how_in, rebuilt
    from dynrank_fx.training import plan_in, restore_run_

    tensors, info = processes.from_one(0, lambda: read_own_run(folder), OfAnotherError, "reading the run")
    set_epochs_of_run_(file, noted)
    net = rebuilt(file.model(), plan_in(info), file.example_inputs(), how_in(info))
    if noted.get("epochs_set"):
        file.set_epochs_(options["epochs"])
    run, task, settings = _set_up(file, options, net, device)
    _seed_apart(processes, options, info["step"] + info["epoch"])
    restore_run_(run, tensors, info)
    return run, task, settings


def _begun(
    ctx: click.Context,
    processes: Processes,
    file: ModelFile,
    folder: Path,
    options: Options,
    device: str,
    as_json: bool,
) -> tuple[Run, Task, Settings]:
    """A new run, with its folder, which is locked from now on."""
    from dynrank_fx.phases import agree_before
    from dynrank_fx.training import clock_of_run, save_run

    launch, given = launched(), options | {"device": device}
    check_pilot_file(file, options)
    file.set_epochs_(options["epochs"])
    net, found = _net(file, given), None
    if options["pilot"] is not None:
        found = _piloted(file, given, net, as_json)
        given |= decided_in({"pilot": found})
        file.set_epochs_(given["epochs"])
    run, task, settings = _set_up(file, given, net, device)
    agree_before(processes, run.net, [run.optimizer])  # while each has all of it, and before there is a folder
    _seed_apart(processes, options, 0)
    facts = {"epochs": clock_of_run(run, task, settings).ticks, "metric": file.metric_name, "versions": _versions()}
    facts |= {"run": run.name, "job": launch.job if launch else None, "epochs_set": True, "pilot": found}
    with processes.all_or_none(OfAnotherError, "beginning the run"):
        if processes.first:
            _make_folder(folder)
            ctx.with_resource(only_one(folder))
            _refuse_run(folder)  # of somebody who began meanwhile
    save_run(run, folder)
    with processes.all_or_none(OfAnotherError, "beginning the run"):
        if processes.first:
            write_run_file(folder, file.path, _plain(options), **facts)
    return run, task, settings


def _piloted(file: ModelFile, options: Options, net: nn.Module, as_json: bool) -> JsonObject:
    """What short runs find for this one, whose random numbers go on as if there had been none."""
    from dynrank_fx.randomness import random_state, set_random_state

    now = random_state()
    settings = settings_of(options, _epochs(file, options), file.optimizer(net.parameters()), options["device"])
    found = decide(net, file, _task(file, options), settings, options, as_json=as_json)
    set_random_state(now)
    return found


def _started_by(launch: Launched | None) -> list[str]:
    """How such a process is started."""
    if launch is None or launch.count == 1:
        return ["dynrank-fx"]
    alone = ["--standalone"] if launch.count == launch.locally else []  # on this machine, with a port of its own
    return ["torchrun", *alone, "--nproc-per-node", str(launch.locally), "-m", "dynrank_fx.cli"]


def _seed_apart(processes: Processes, options: Options, steps: int) -> None:
    """Random numbers of its own for each process, once all have made the same net."""
    from dynrank_fx.randomness import seed_all

    if processes.rank > 0:
        seed_all((options["seed"] + processes.rank * 1_000_003 + steps) % 2**63)


def _refuse_other_files(processes: Processes, model_file: Path) -> None:
    """Raises ModelFileError in all processes where one has another model file."""
    digests = processes.gathered(hashlib.sha256(model_file.read_bytes()).hexdigest())
    other = next((rank for rank, digest in enumerate(digests) if digest != digests[0]), None)
    if other is not None:
        raise ModelFileError(
            f"{model_file} of process {other} is another than that of process 0: give all the same file, and what it "
            "imports"
        )


def _print_result(run: Run, clock: Clock, folder: Path, as_json: bool) -> None:
    """Where the run stands, as JSON, for a program that asked for it."""
    if not as_json:
        return
    last = run.history[-1].to_json() if run.history else {}
    last.pop("switch_spectra", None)
    data = {"run": str(folder), "epoch": run.epoch, "epochs": clock.ticks, "step": run.step, "last": last}
    echo(json_text(data))


def _versions() -> dict[str, str]:
    import platform

    import torch

    from dynrank_fx.version import __version__

    return {"dynrank-fx": __version__, "torch": str(torch.__version__), "Python": platform.python_version()}


def _options_of(ctx: click.Context, folder: Path, noted: JsonObject, given: Options) -> JsonObject:
    """The options of a run, as it was started with them, or as its pilot decided. Raises StoreError where one is given
    again with another value.
    """
    started, decided = noted["options"], decided_in(noted)
    for each in (started, decided):
        wrong = [name for option in ctx.command.params if not _fits(ctx, option, each.get(name := option.name or ""))]
        if wrong:
            raise StoreError(
                f"{folder / RUN_FILE} is damaged: its {wrong[0]} is {each[wrong[0]]!r}; put an earlier copy back"
            )
    for name, value in _plain(given).items():
        said = name != "fsdp" and ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
        if said and value != started.get(name):
            flag = "--" + name.removesuffix("_file").replace("_", "-").replace("start", "from")
            before = started.get(name)
            then = f"without {flag}" if before in (None, []) or before is False else f"with {flag} {before}"
            raise StoreError(f"the run in {folder} was started {then}: leave {flag} out, or start another run")
    # An older run may not know every option, and how the processes hold the net is no matter of the run.
    return {**_plain(given), **started, **decided, "fsdp": given["fsdp"]}


def _fits(ctx: click.Context, option: click.Parameter, value: Json) -> bool:
    """Whether an option may have had this value, as JSON has it."""
    try:
        option.type_cast_value(ctx, value)
    except (click.UsageError, TypeError, ValueError, AttributeError):  # click's own are made for texts
        return False
    if option.multiple:
        return value is None or isinstance(value, list)
    return value is None or isinstance(value, str) or not isinstance(option.type, click.types.StringParamType)


def _plain(options: Options) -> JsonObject:
    """As they come back from JSON."""
    return {k: str(v) if isinstance(v, Path) else list(v) if isinstance(v, tuple) else v for k, v in options.items()}


def _refuse_run(folder: Path) -> None:
    if (folder / RUN_FILE).exists():
        raise StoreError(f"{folder} holds a run already: add --resume to go on with it, or choose another --out")


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"{folder} could not be made ({error.strerror}); choose another --out") from error


def _set_up(file: ModelFile, options: Options, net: nn.Module, device: str) -> tuple[Run, Task, Settings]:
    """The run as at its first step: the same on a resume, before the checkpoint is taken over."""
    from dynrank_fx.randomness import generators_of
    from dynrank_fx.training import Run, check_costs, clock_for

    # What is to be in parts need not fit the device whole.
    net = net.to("cpu" if options["fsdp"] else device).train()
    optimizer = file.optimizer(net.parameters())
    lr_scheduler, every_step = file.lr_scheduler(optimizer)
    settings = settings_of(options, _epochs(file, options), optimizer, device)
    check_costs(net, settings.cost_by)
    task = _task(file, options)
    schedule = schedule_of(options, clock_for(task, settings), lr_scheduler, every_step)
    generators = generators_of(task.train_data, task.eval_data)
    run = Run(net, optimizer, schedule, lr_scheduler, lr_every_step=every_step, generators=generators)
    return run, task, settings


def _epochs(file: ModelFile, options: Options) -> int | None:
    """Of the run; None where it is counted in steps."""
    return None if options.get("steps") else options["epochs"] or file.epochs or 10


def _task(file: ModelFile, options: Options) -> Task:
    from dynrank_fx.training import Task

    return Task(
        train_data=_train_data(file, options["workers"]),
        loss=file.loss,
        inputs=file.inputs,
        eval_data=file.eval_data(),
        metric=file.metric,
        guard=file.guard,
        sharded=file.sharded,
    )


def _train_data(file: ModelFile, workers: int | None) -> Iterable[Batch]:
    """The batches of an epoch, loaded by so many processes."""
    from torch.utils.data import DataLoader

    data = file.train_data()
    if workers is None:
        return data
    if not isinstance(data, DataLoader):
        raise ModelFileError(
            f"--workers is of a DataLoader, and train_data() gave a {type(data).__name__}: leave it out, or give one"
        )
    data.num_workers = workers
    data.prefetch_factor = data.prefetch_factor or (2 if workers else None)  # as DataLoader itself chooses
    return data


def _net(file: ModelFile, options: Options) -> nn.Module:
    if options["start"] is not None:
        from dynrank_fx.phases import load

        refuse_beside("--from")
        if options["weights"] is not None:
            raise click.UsageError("--from brings its weights along: leave out --weights")
        return load(options["start"], file.model(), file.example_inputs())
    of_preset = all(options[name] is None for name in ("rank", "energy", "plan_file"))
    return transformed(file, options, policy=how_to_train(options).rank if of_preset else None)


def check_device(device: str) -> None:
    """Raises ModelFileError for a device that cannot be used here."""
    import torch

    try:
        torch.zeros(1, device=device).item()  # which the device meta has not
    except (RuntimeError, AssertionError, ImportError) as error:
        raise click.BadParameter(
            f"{device!r} cannot be used here ({first_line(error)}): give cpu", param_hint="--device"
        ) from error


def _with_tensorboard(bar: Watcher, folder: Path) -> Watcher:
    from dynrank_fx.training import Watchers

    try:
        from dynrank_fx.integrations.tensorboard import TensorBoard
    except ImportError as error:
        raise ModelFileError("--tensorboard needs TensorBoard: pip install tensorboard") from error
    return Watchers(bar, TensorBoard(folder / "tensorboard"))
