"""``dynrank-fx export``: from a run to an ONNX file that onnxruntime agrees with."""

from __future__ import annotations

from pathlib import Path

import click

from dynrank_fx.text import json_text

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


@click.command()
@click.argument("source", type=given_path)
@click.option("--out", "-o", type=given_path, required=True, metavar="FILE", help="The ONNX file to write.")
@click.option("--model", "model_file", type=given_path, metavar="MODEL.PY", help="The model file, where it has moved.")
@weights_option
@click.option("--provider", metavar="NAME", help="An execution provider of onnxruntime; by default the best there is.")
@calibrate_option
@export_options
@json_option
def export(source: Path, out: Path, model_file: Path | None, calibrate: int, as_json: bool, **options: Option) -> None:
    """Truncate a run (or a folder of `transform`), export it, and compare it with PyTorch in onnxruntime.

    Layers that are dense at the end are cut so that their outputs on the calibration batches change least. What the
    model leaves free stays free: the batch, and where it can be a sequence or the size of an image. FILE appears only
    if the outputs agree at every size; the execution provider that really ran is named. SOURCE may also be a model file
    (with --weights), exported as it is, to compare others with; or, with --model, a .pt file of `compress`, which runs
    code as it is loaded: only one of your own.

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
    final = final_form(source, model_file, options["weights"], calibrate)
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
    echo(json_text(report.to_json()) if as_json else str(report))
