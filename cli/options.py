"""Options that several commands take, and the values they stand for. Nothing heavy is imported until a command runs."""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import click

from dynrank_fx.aliases import Kwargs
from dynrank_fx.checks import COMPILE_MODES
from dynrank_fx.errors import DynrankError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from dynrank_fx.layouts import ConvLayout
    from dynrank_fx.plan import Override, PlanOptions, RankPolicy, Role, StepTimes
    from dynrank_fx.tracing import Capture, Form

    from .modelfile import ModelFile

Option: TypeAlias = Any
"""The value of an option: click hands on what the option declares, and types it as ``Any``."""

Options: TypeAlias = dict[str, Option]
"""The options of a command by name."""


_LONGEST = 255  # bytes of a name on the usual disks, also where its folder is still to be made


def given_path(text: str) -> Path:
    """The type of an option that names a file or a folder, there or not."""
    try:
        if not text:
            raise click.BadParameter("the name is empty: give one, or leave the option out")
        if any(len(os.fsencode(part)) > _LONGEST for part in Path(text).parts):
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        os.lstat(text)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:  # a name that is too long, or a folder that is closed
        raise click.BadParameter(f"{text[:40]}{'...' * (len(text) > 40)} cannot be used: {error.strerror}") from error
    return Path(text)


@contextmanager
def of_option(flag: str) -> Iterator[None]:
    """What the library says of a value, told as a mistake in using the command."""
    try:
        yield
    except DynrankError as error:
        raise click.BadParameter(str(error), param_hint=flag) from error


class Number(click.FloatRange):
    """A number within bounds, which nan is not."""

    def convert(self, value: Option, param: click.Parameter | None, ctx: click.Context | None) -> Option:
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value} is no number", param, ctx)
        return number


# The layouts of convolutions by name, so that `--help` need not import them: as in dynrank_fx.layouts.
CONV_LAYOUTS = ("channel", "input", "spatial", "tucker", "cp")

capture_option = click.option(
    "--capture",
    "how",
    type=click.Choice(["symbolic", "export", "modules"]),
    help="How the model becomes a graph; by default the first of these that is faithful and opens every layer.",
)

form_option = click.option(
    "--form",
    type=click.Choice(["graph", "layers"]),
    default="graph",
    help="layers: a copy of the model, with its own class, methods and code, in which single layers are replaced.",
)

share_inputs_option = click.option(
    "--share-inputs", is_flag=True, help="Linears that read the same input (query, key, value) share a factor."
)

_PLAN_OPTIONS = (
    click.option("--rank", metavar="R", help="A fraction of each matrix (0.25, the default) or one rank for all (16)."),
    click.option(
        "--energy",
        type=Number(0, 1, min_open=True),
        metavar="E",
        help="Instead: the least rank that keeps this share of the squares.",
    ),
    click.option("--include", multiple=True, metavar="PATTERN", help="Only weights whose name fits; may be repeated."),
    click.option("--exclude", multiple=True, metavar="PATTERN", help="No weights whose name fits; may be repeated."),
    click.option(
        "--override",
        "override",
        multiple=True,
        metavar="PATTERN=WHAT",
        help="For weights whose name fits: dense, a rank (16 or 0.5), a layout (spatial), or several (spatial,0.5).",
    ),
    click.option(
        "--multiple-of", type=click.IntRange(min=1), default=1, metavar="N", help="Round ranks up to a multiple of N."
    ),
    click.option(
        "--layout",
        type=click.Choice(CONV_LAYOUTS),
        default="channel",
        help="Of convolutions.",
    ),
    click.option(
        "--leave",
        multiple=True,
        type=click.Choice(["stem", "shortcut", "head", "none"]),
        default=("stem", "shortcut", "head"),
        show_default=True,
        help="Weights that stay dense by what they are for; may be repeated.",
    ),
    share_inputs_option,
    capture_option,
    form_option,
    click.option("--plan", "plan_file", type=given_path, metavar="FILE", help="Instead: an edited plan.json."),
)


measure_option = click.option(
    "--measure",
    is_flag=True,
    help="Time each site in a training step, and factor only what is then faster; kept by machine.",
)

compile_option = click.option(
    "--compile",
    type=click.Choice(COMPILE_MODES),
    help="The mode of torch.compile; max-autotune-no-cudagraphs tries many kernels, on a GPU.",
)

amp_option = click.option(
    "--amp", type=click.Choice(["bf16", "float16"]), help="Autocast; float16 with scaled gradients."
)

_EXPORT_OPTIONS = (
    click.option("--opset", type=int, metavar="N", help="ONNX opset; by default the exporter's own."),
    click.option(
        "--batch",
        "batches",
        type=click.IntRange(min=1),
        multiple=True,
        help="A batch size to compare on; by default 1, 2 and 5.",
    ),
    click.option(
        "--precision",
        type=click.Choice(["float32", "float16", "bfloat16", "int8"]),
        default="float32",
        show_default=True,
        help="Of the file's numbers; int8 stores weights alone. Inputs and outputs stay float32.",
    ),
    click.option(
        "--dynamic",
        multiple=True,
        metavar="ARG:AXIS=NAME",
        help="A free dimension under a name, such as x:0=batch; may be repeated. By default all that can be.",
    ),
    click.option("--input-name", "inputs", multiple=True, metavar="NAME", help="Names of the file's inputs, in order."),
    click.option("--output-name", "outputs", multiple=True, metavar="NAME", help="Names of its outputs, in order."),
    click.option("--external-data", is_flag=True, help="Weights in FILE.data, which above 2 GB they are anyway."),
)
_OF_EXPORT = ("opset", "batches", "precision", "dynamic", "inputs", "outputs", "external_data")

weights_option = click.option(
    "--weights", type=given_path, metavar="FILE", help="A state_dict for model(), or a checkpoint: .pt or .safetensors."
)

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout, and all else on stderr.")

calibrate_option = click.option(
    "--calibrate",
    type=click.IntRange(min=0),
    default=16,
    show_default=True,
    metavar="N",
    help="Batches of calibration_data() or train_data() that a cut looks at; 0 for a plain SVD.",
)

# The names under which a command gets them.
PLAN_OPTIONS = (
    *("rank", "energy", "include", "exclude", "override", "multiple_of"),
    *("layout", "share_inputs", "leave", "how", "plan_file", "measure"),
)


def plan_options(command: Callable[..., object]) -> Callable[..., object]:
    """The options that decide what is factored."""
    for option in reversed(_PLAN_OPTIONS):
        command = option(command)
    return command


def export_options(command: Callable[..., object]) -> Callable[..., object]:
    """The options that say what an ONNX file is like."""
    for option in reversed(_EXPORT_OPTIONS):
        command = option(command)
    return command


def export_arguments(options: Options) -> Kwargs:
    """What ``export_options`` were given, as arguments of ``export_onnx``."""
    from dynrank_fx.onnx import Precision

    return {
        "opset": options["opset"],
        "batch_sizes": options["batches"] or (1, 2, 5),
        "precision": Precision(options["precision"]),
        "dynamic": _dynamic(options["dynamic"]),
        "input_names": options["inputs"],
        "output_names": options["outputs"],
        "external_data": options["external_data"] or None,
    }


def check_export(out: Path, arguments: Options, provider: str | None) -> None:
    """Refuse, before any work, what would stop the export after it."""
    from dynrank_fx.onnx import check_opset, check_place, check_precision

    check_place(out)
    with of_option("--opset"):
        check_opset(arguments["opset"])
    check_given_provider(provider)
    check_precision(arguments["precision"], provider)


def check_given_provider(provider: str | None) -> None:
    """Refuse an execution provider that the onnxruntime here has not."""
    from dynrank_fx.onnx import check_provider

    with of_option("--provider"):
        if provider is not None:
            check_provider(provider)


def check_model(out: Path, module: nn.Module, file: ModelFile, arguments: Options) -> None:
    """Refuse, before any work, names that are not those of the model, and a disk without room for it."""
    from dynrank_fx.onnx import check_names, check_room

    names = (arguments["input_names"], arguments["output_names"], arguments["dynamic"])
    check_names(module, file.example_inputs(), *names)
    check_room(out, module, arguments["precision"])


def refuse_export_options(out: Path) -> None:
    """Refuse the options of an ONNX file for a file that is none."""
    for parameter in given_options(_OF_EXPORT):
        raise click.UsageError(f"{parameter.opts[0]} is of an ONNX file, and {out} is none: leave it out")


def _dynamic(texts: tuple[str, ...]) -> dict[str, dict[int, str]] | None:
    """The free dimensions by argument, from ``ARG:AXIS=NAME``."""
    free: dict[str, dict[int, str]] = {}
    for text in texts:
        place, equals, name = text.partition("=")
        argument, colon, axis = place.rpartition(":")
        if not (equals and colon and argument and axis.isdigit() and name.isidentifier()):
            raise click.BadParameter(f"{text!r} is not ARG:AXIS=NAME, such as x:0=batch", param_hint="--dynamic")
        free.setdefault(argument, {})[int(axis)] = name
    return free or None


def roles_of(leave: tuple[str, ...]) -> list[Role]:
    """The roles that ``--leave`` names; none beside others is a contradiction."""
    from dynrank_fx.plan import Role

    if "none" in leave and len(set(leave)) > 1:
        raise click.BadParameter("none beside others says two things: give one of them", param_hint="--leave")
    return [Role[name.upper()] for name in leave if name != "none"]


def refuse_beside(flag: str, *but: str) -> None:
    """Refuse the options of planning that a plan made before would leave without effect."""
    for parameter in given_options(PLAN_OPTIONS):
        if parameter.name not in but:
            raise click.UsageError(f"{flag} brings its plan along: leave out {parameter.opts[0]}")


def given_options(names: Collection[str]) -> list[click.Parameter]:
    """The options of these names that the command line has, whatever their values."""
    context = click.get_current_context()
    source = click.core.ParameterSource
    given = {name for name in names if context.get_parameter_source(name) in (source.COMMANDLINE, source.ENVIRONMENT)}
    return [parameter for parameter in context.command.params if parameter.name in given]


def rank_policy(rank: str | None, energy: float | None, hint: str = "--rank") -> RankPolicy:
    """The rank policy that ``--rank`` or ``--energy`` asks for."""
    from dynrank_fx.plan import Energy, Fixed, Ratio

    if rank is not None and energy is not None:
        raise click.UsageError("give --rank or --energy, not both")
    if energy is not None:
        return Energy(energy)
    if rank is None:
        return Ratio(0.25)
    try:
        with of_option(hint):
            return Ratio(float(rank)) if "." in rank else Fixed(int(rank))
    except ValueError as error:
        raise click.BadParameter(f"{rank!r} is neither a fraction (0.25) nor a rank (16)", param_hint=hint) from error


def overrides_of(texts: tuple[str, ...]) -> dict[str, Override]:
    """The overrides that ``--override`` asks for, by pattern."""
    from dynrank_fx.plan import Override

    overrides = {}
    for text in texts:
        pattern, equals, words = text.rpartition("=")
        if not equals or not pattern:
            raise click.BadParameter(f"{text!r} is not PATTERN=WHAT, such as 'head=dense'", param_hint="--override")
        said: Kwargs = {}
        for word in words.split(","):
            if word == "dense":
                more: Kwargs = {"dense": True}
            elif word in CONV_LAYOUTS:
                more = {"layout": _conv_layout(word)}
            elif word.replace(".", "").replace("-", "").isdigit():
                more = {"rank": rank_policy(word, None, hint="--override")}
            else:
                known = ", ".join(("dense", *CONV_LAYOUTS))
                raise click.BadParameter(
                    f"{word!r} is neither a rank (16 or 0.5) nor one of {known}", param_hint="--override"
                )
            if said.keys() & more.keys():
                raise click.BadParameter(f"{text!r} gives its {next(iter(more))} twice", param_hint="--override")
            said |= more
        if pattern in overrides:
            raise click.BadParameter(f"{pattern!r} is given twice: put it into one", param_hint="--override")
        overrides[pattern] = Override(**said)
    return overrides


def _conv_layout(word: str) -> ConvLayout:
    from dynrank_fx import layouts

    return next(layout for layout in layouts.CONV_LAYOUTS if layout.name == word)


def check_plan_options(options: Options) -> None:
    """Refuse, before anything is looked at, what ``plan_options`` cannot be."""
    rank_policy(options["rank"], options["energy"])
    overrides_of(options["override"])
    roles_of(options["leave"])


def plan_options_of(options: Options, policy: RankPolicy | None = None) -> PlanOptions:
    """What ``plan_options`` were given. policy: in place of ``--rank`` and ``--energy``."""
    from dynrank_fx.plan import PlanOptions

    return PlanOptions(
        rank=policy or rank_policy(options["rank"], options["energy"]),
        include=options["include"],
        exclude=options["exclude"],
        overrides=overrides_of(options["override"]),
        multiple_of=options["multiple_of"],
        conv_layout=_conv_layout(options["layout"]),
        share_inputs=options["share_inputs"],
        leave=roles_of(options["leave"]),
    )


def transformed(
    file: ModelFile,
    options: Options,
    *,
    policy: RankPolicy | None = None,
    allow_empty: bool = False,
    model: nn.Module | None = None,
) -> nn.Module:
    """The model of a model file, or another that it gave, transformed as ``plan_options`` say."""
    from dynrank_fx.phases import read_plan
    from dynrank_fx.rewrite import transform

    plan: Kwargs
    if options["plan_file"] is not None:
        refuse_beside("--plan", "plan_file", "how", "form")
        plan = {"plan": read_plan(options["plan_file"])}
    else:
        plan = {"options": plan_options_of(options, policy)}
        if options.get("measure"):
            plan["times"] = step_times_of(file, options)
    form, how = form_of(options["form"]), capture_of(options["how"])
    model = file.model() if model is None else model
    return transform(model, file.example_inputs(), form=form, how=how, allow_empty=allow_empty, **plan)


def step_times_of(file: ModelFile, options: Options) -> StepTimes:
    """What measures sites as the options say that the net will train."""
    from dynrank_fx.plan import StepTimes

    amp = amp_of(options["amp"])
    return StepTimes(options["device"], amp=amp, compile=compile_of(options), inputs=file.training_inputs())


def compile_of(options: Options) -> bool | str:
    """Whether ``--compile`` and ``--no-compile`` ask for compiling, or in which mode."""
    eager = "--no-compile" if options["no_compile"] else "--fsdp" if options.get("fsdp") else None
    for name, flag in (("compile", "--compile"), ("activation_memory", "--activation-memory")):
        if eager and options.get(name) is not None:
            raise click.UsageError(f"{flag} is of torch.compile, which {eager} leaves out: give one of them")
    return False if eager else options.get("compile") or True


def amp_of(name: str | None) -> torch.dtype | None:
    """The type that ``--amp`` names."""
    import torch

    return {"bf16": torch.bfloat16, "float16": torch.float16, None: None}[name]


def form_of(name: str) -> Form:
    """The form that ``--form`` names."""
    from dynrank_fx.tracing import Form

    return Form[name.upper()]


def capture_of(name: str | None) -> Capture | None:
    """The capture that ``--capture`` names."""
    from dynrank_fx.tracing import Capture

    return None if name is None else Capture[name.upper()]
