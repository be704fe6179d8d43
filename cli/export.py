"""``dynrank-fx export``: from a run to an ONNX file that onnxruntime agrees with."""

from __future__ import annotations

import shlex
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dynrank_fx.errors import DynrankError, DynrankWarning
from dynrank_fx.text import counted, json_text

from .options import (
    Option,
    calibrate_option,
    check_export,
    check_model,
    export_arguments,
    export_options,
    given_path,
    json_option,
    weights_option,
)
from .streams import echo

if TYPE_CHECKING:
    from dynrank_fx.compression import SiteTimes
    from dynrank_fx.onnx import Beside, ExportReport, Precision

    from .runs import FinalForm


@click.command()
@click.argument("source", type=given_path)
@click.option("--out", "-o", type=given_path, required=True, metavar="FILE", help="The ONNX file to write.")
@click.option("--model", "model_file", type=given_path, metavar="MODEL.PY", help="The model file, where it has moved.")
@weights_option
@click.option("--provider", metavar="NAME", help="An execution provider of onnxruntime; by default the best there is.")
@calibrate_option
@click.option("--no-timing", is_flag=True, help="Do not time the file beside the same model with dense weights.")
@click.option("--never-slower", is_flag=True, help="Layers that are slower in factors, each by itself, stay dense.")
@export_options
@json_option
def export(
    source: Path,
    out: Path,
    model_file: Path | None,
    calibrate: int,
    no_timing: bool,
    never_slower: bool,
    as_json: bool,
    **options: Option,
) -> None:
    """Truncate a run (or a folder of `transform`), export it, and compare it with PyTorch in onnxruntime.

    Layers that are dense at the end are cut so that their outputs on the calibration batches change least. What the
    model leaves free stays free: the batch, and where it can be a sequence or the size of an image. FILE appears only
    if the outputs agree at every size; the execution provider that really ran is named. It is then timed beside the
    same model with dense weights, for about two seconds. SOURCE may also be a model file (with --weights), exported as
    it is, to compare others with; or, with --model, a .pt file of `compress`, which runs code as it is loaded: only one
    of your own.

    \b
    Example:
      dynrank-fx export digits-run -o digits.onnx
    """
    from dynrank_fx.onnx import export_onnx

    from .runs import final_form

    if out.suffix != ".onnx":
        raise click.BadParameter(f"{out} is no .onnx file", param_hint="--out")
    arguments = export_arguments(options)
    check_export(out, arguments, options["provider"])
    times = _times(options) if never_slower else None
    final = final_form(source, model_file, options["weights"], calibrate, times)
    if times is not None:
        times.save()
    check_model(out, final.module, final.file, arguments)
    report = export_onnx(
        final.module,
        final.file.example_inputs(),
        out,
        more_inputs=final.real[:1],
        providers=None if options["provider"] is None else [options["provider"]],
        metadata=final.metadata,
        **arguments,
    )
    if not as_json:
        echo(str(report))
        if final.left_dense:
            layers = counted(len(final.left_dense), "layer")
            echo(f"{layers} left dense, slower in factors: {', '.join(final.left_dense)}")
    beside = None if no_timing else _beside_dense(report, final, arguments["precision"], options["provider"])
    if as_json:
        dense = {"beside_dense": None if beside is None else beside.to_json(), "left_dense": final.left_dense}
        echo(json_text({**report.to_json(), **dense}))
    elif beside is not None:
        echo(str(beside))
    if beside is not None and beside.slower:
        given = [str(source), *(() if model_file is None else ("--model", str(model_file)))]
        command = shlex.join(["dynrank-fx", "compress", *given, "--budget", "latency=0.9", "-o", str(out)])
        option = "" if never_slower else "--never-slower leaves dense each layer that is, and "
        said = f"{out} is slower than with dense weights: {option}`{command}` looks for a cut that is faster as a whole"
        warnings.warn(said, DynrankWarning, stacklevel=1)


def _times(options: dict[str, Option]) -> SiteTimes:
    """What times the sites on the provider that is to run the file."""
    from dynrank_fx.compression import SiteTimes
    from dynrank_fx.onnx import best_provider

    return SiteTimes(
        options["provider"] or best_provider(), "float16" if options["precision"] == "float16" else "float32"
    )


def _beside_dense(report: ExportReport, final: FinalForm, precision: Precision, provider: str | None) -> Beside | None:
    """None where nothing was made of low rank, and, with a word, where the dense model cannot be timed."""
    from dynrank_fx.onnx import time_beside

    if final.dense is None:
        return None
    try:
        return time_beside(
            report.path,
            final.dense(),
            final.file.example_inputs(),
            opset=report.opset,
            precision=precision,
            provider=provider,
        )
    except DynrankError as error:
        echo(f"not timed beside the same model with dense weights: {error}", err=True)
        return None
