"""``dynrank-fx compress``: a trained model, of any training, made smaller or faster within a budget."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain, count
from pathlib import Path
from pickle import PicklingError
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from dynrank_fx.errors import ExportError, StoreError
from dynrank_fx.files import check_file_place, finish
from dynrank_fx.text import json_text

from .options import (
    Option,
    Options,
    calibrate_option,
    capture_of,
    capture_option,
    check_export,
    check_model,
    export_arguments,
    export_options,
    form_of,
    form_option,
    given_path,
    json_option,
    of_option,
    refuse_beside,
    refuse_export_options,
    roles_of,
    share_inputs_option,
    weights_option,
)
from .runs import calibration_inputs, metric_of, open_run
from .sanity import suspicions
from .streams import echo

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dynrank_fx.aliases import Batch, JsonObject, Kwargs, Output
    from dynrank_fx.compression import Compressed, MaxDrop
    from dynrank_fx.plan import RankPolicy
    from dynrank_fx.tracing import ExampleInputs

    from .modelfile import ModelFile


@click.command()
@click.argument("source", type=given_path)
@click.option(
    "--budget",
    "budgets",
    required=True,
    multiple=True,
    metavar="OF=SHARE",
    help="params=0.5, flops=0.5 or latency=0.7 of the dense model, or max_drop=0.01 of the metric; all that are given.",
)
@click.option(
    "--out", "-o", type=given_path, required=True, metavar="FILE", help="model.onnx, or model.pt for PyTorch."
)
@weights_option
@click.option(
    "--model", "model_file", type=given_path, metavar="MODEL.PY", help="A run's model file, where it has moved."
)
@calibrate_option
@click.option(
    "--sequential",
    is_flag=True,
    help="Calibrate every layer on what the cut ones before it give: slower, and not always better.",
)
@click.option(
    "--recover-steps", type=click.IntRange(min=0), default=0, metavar="N", help="Fine-tune the result for N steps."
)
@click.option(
    "--recover-by",
    type=click.Choice(["outputs", "loss"]),
    default="outputs",
    show_default=True,
    help="Towards the dense model's outputs, or by the file's loss.",
)
@click.option("--provider", default="CPUExecutionProvider", show_default=True, help="Where it will run, and is timed.")
@click.option("--no-timing", is_flag=True, help="Measure nothing: sites are not put back for being slow.")
@click.option("--include", multiple=True, metavar="PATTERN", help="Only weights whose name fits; may be repeated.")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="No weights whose name fits; may be repeated.")
@click.option("--multiple-of", type=click.IntRange(min=1), default=1, metavar="N", help="Ranks are multiples of N.")
@click.option(
    "--leave",
    multiple=True,
    type=click.Choice(["stem", "shortcut", "head", "none"]),
    default=("none",),
    show_default=True,
    help="Weights that stay dense by what they are for; may be repeated.",
)
@share_inputs_option
@capture_option
@form_option
@export_options
@json_option
def compress(source: Path, budgets: tuple[str, ...], out: Path, as_json: bool, **options: Option) -> None:
    """Cut a trained model so that its outputs change least, within a budget; SOURCE is a model file or a run.

    model() (with --weights, or as it is) has to be trained. Where eval_data() and metric() are there, both models are
    scored. A layer that is not faster in onnxruntime with factors stays dense, and the whole is never slower than it
    was, unless the budget is one of parameters, which then says so.

    \b
    Example:
      dynrank-fx compress digits.py --weights digits.pt --budget flops=0.5 -o small.onnx
    """
    from dynrank_fx.compression import SiteTimes
    from dynrank_fx.compression import compress as compressed
    from dynrank_fx.randomness import seed_all

    asked, leave = [_budget(text) for text in budgets], roles_of(options["leave"])
    if source.is_dir():
        refuse_beside(str(source), "multiple_of")
    if out.suffix not in (".onnx", ".pt"):
        raise click.BadParameter(f"{out} is neither an .onnx nor a .pt file", param_hint="--out")
    if out.suffix == ".pt":
        refuse_export_options(out)
    by = click.get_current_context().get_parameter_source("recover_by")
    if by is not ParameterSource.DEFAULT and not options["recover_steps"]:
        raise click.UsageError("--recover-by is of --recover-steps: give the number of steps too")
    check_file_place(out)
    arguments = export_arguments(options)
    check_export(out, arguments, options["provider"])
    element = "float16" if options["precision"] == "float16" else "float32"
    net, file = _opened(source, options["model_file"], options["weights"])
    tell = _teller()
    tell("looking at the model and its data")
    if out.suffix == ".onnx":
        check_model(out, net, file, arguments)
    seed_all(0)
    batches = file.calibration_batches(options["calibrate"])
    warnings = suspicions(file, net, batches)
    for sentence in warnings:
        echo(f"Warning: {sentence}", err=True)
    by_loss = options["recover_by"] == "loss" and options["recover_steps"]
    result = compressed(
        net,
        file.example_inputs(),
        asked,
        [file.inputs(batch) for batch in batches] or None,
        metric=metric_of(file),
        recover_steps=options["recover_steps"],
        loss=_loss(file, batches) if by_loss else None,
        times=None if options["no_timing"] else SiteTimes(options["provider"], element),
        multiple_of=options["multiple_of"],
        include=options["include"],
        exclude=options["exclude"],
        leave=leave,
        share_inputs=options["share_inputs"],
        sequential=options["sequential"],
        form=form_of(options["form"]),
        how=capture_of(options["how"]),
        progress=tell,
    )
    if out.suffix == ".onnx":
        tell("exporting, and comparing the file with PyTorch")
    try:
        written, said = _written(result, file, out, options, arguments)
    finally:  # after the file is there, and also where it could not be
        if not as_json:
            echo(f"{result}\n")
    echo(json_text({**result.to_json(), "warnings": warnings, "file": written}) if as_json else said)


def _written(
    result: Compressed, file: ModelFile, out: Path, options: Options, arguments: Kwargs
) -> tuple[JsonObject, str]:
    """Write the file, and tell of it for programs and in words."""
    from dynrank_fx.onnx import export_onnx

    if out.suffix == ".pt":
        _store(result.module, out, file.example_inputs())
        return {"path": str(out)}, f"{out}: a PyTorch module, for torch.load(..., weights_only=False)"
    with _kept(result.module, _free(out.with_name(f"{out.name}.pt")), file.example_inputs()):
        report = export_onnx(
            result.module,
            file.example_inputs(),
            out,
            more_inputs=calibration_inputs(file, min(options["calibrate"], 1)),
            providers=[options["provider"]],
            metadata=result.metadata,
            **arguments,
        )
    return report.to_json(), str(report)


def _teller() -> Callable[[str], None]:
    """Prints what is being done on stderr, with the seconds so far."""
    started = time.monotonic()

    def tell(sentence: str) -> None:
        echo(f"[{time.monotonic() - started:4.0f} s] {sentence}", err=True)

    return tell


def _budget(text: str) -> RankPolicy | MaxDrop:
    from dynrank_fx.compression import MaxDrop
    from dynrank_fx.plan import Budget

    what, _, number = text.partition("=")
    try:
        value = float(number)
    except ValueError:
        value = None
    if what not in ("params", "flops", "latency", "max_drop") or value is None:
        raise click.BadParameter(
            f"{text!r} is none: give params=0.5, flops=0.5, latency=0.7 or max_drop=0.01", param_hint="--budget"
        )
    shares: Kwargs = {what: value}
    with of_option("--budget"):
        return MaxDrop(value) if what == "max_drop" else Budget(**shares)


def _opened(source: Path, model_file: Path | None, weights: Path | None) -> tuple[nn.Module, ModelFile]:
    if not source.is_dir():
        if model_file is not None:
            raise click.UsageError(f"--model is of a run, and {source} is none: leave it out")
        from .modelfile import load_model_file

        file = load_model_file(source, weights)
        return file.model(), file
    if weights is not None:
        raise click.UsageError("a run has its own weights: leave out --weights")
    opened = open_run(source, model_file)
    return opened.net, opened.file


def _loss(file: ModelFile, batches: list[Batch]) -> Callable[[Output, int], Tensor]:
    file.require("loss", command="--recover-by loss")
    return lambda output, number: file.loss(output, batches[number])


def _store(module: nn.Module, out: Path, inputs: ExampleInputs) -> None:
    import torch

    from dynrank_fx.files import replacing

    stored = io.BytesIO()  # torch's own writer does not say that a disk is full
    torch.save(module, stored)
    stored.seek(0)
    lost = _lost(module, torch.load(stored, weights_only=False), inputs)
    if lost:
        raise StoreError(
            f"{out} cannot hold this model: once it is loaded, {lost}; give an .onnx file, or --form layers"
        )
    with replacing(out) as beside:
        beside.write_bytes(stored.getbuffer())


def _lost(module: nn.Module, loaded: nn.Module, inputs: ExampleInputs) -> str:
    """How a module that was pickled, and its graph traced anew, differs from what it was; empty where it does not."""
    from dynrank_fx.tracing import ROUNDING, Original, difference

    before, after = module.state_dict(), loaded.state_dict()
    if before.keys() != after.keys():
        return f"{min(before.keys() ^ after.keys())} is in one of their state_dicts alone"
    changed = [name for name, value in before.items() if not after[name].equal(value)]
    if changed:
        return f"{changed[0]} has another value"
    apart = difference(loaded, Original(module, inputs))
    return apart.words.rstrip(".") if apart.size > ROUNDING else ""


def _free(path: Path) -> Path:
    """This name, or the next one that nothing has."""
    finish(path)
    names = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in count(2))
    return next(each for each in chain([path], names) if not os.path.lexists(each))


@contextmanager
def _kept(module: nn.Module, path: Path, inputs: ExampleInputs) -> Iterator[None]:
    """The module in a file until the export is done, which may fail after all the work, or take the process along."""
    kept = False
    with suppress(StoreError, PicklingError, AttributeError, TypeError):  # then there is only the export
        _store(module, path, inputs)
        kept = True
    try:
        yield
    except ExportError as error:
        if not kept:
            raise
        raise ExportError(
            f"{error}. The compressed module is in {path}; go on with `dynrank-fx export {path} --model MODEL.PY`"
        ) from error
    path.unlink(missing_ok=True)
