"""``dynrank-fx export``: from a run to an ONNX file that onnxruntime agrees with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .options import calibrate_option


@click.command()
@click.argument("run", type=Path)
@click.option("--out", "-o", type=Path, required=True, metavar="FILE", help="The ONNX file to write.")
@click.option("--model", "model_file", type=Path, metavar="MODEL.PY", help="The model file, where it has moved.")
@click.option("--opset", type=int, metavar="N", help="ONNX opset; by default the exporter's own.")
@click.option("--batch", "batches", type=int, multiple=True, help="A batch size to compare on; by default 1, 2 and 5.")
@click.option("--provider", metavar="NAME", help="An execution provider of onnxruntime; by default the best there is.")
@calibrate_option
@click.option(
    "--precision",
    type=click.Choice(["float32", "float16", "bfloat16", "int8"]),
    default="float32",
    show_default=True,
    help="Of the file's numbers; int8 stores weights alone. Inputs and outputs stay float32.",
)
@click.option(
    "--dynamic",
    multiple=True,
    metavar="ARG:AXIS=NAME",
    help="A free dimension under a name, such as x:0=batch; may be repeated. By default the first of every input.",
)
@click.option("--input-name", "inputs", multiple=True, metavar="NAME", help="Names of the file's inputs, in order.")
@click.option("--output-name", "outputs", multiple=True, metavar="NAME", help="Names of its outputs, in order.")
@click.option("--external-data", is_flag=True, help="Weights in FILE.data, which above 2 GB they are anyway.")
def export(run: Path, out: Path, model_file: Path | None, calibrate: int, **options: Any) -> None:
    """Truncate a run (or a folder of `transform`), export it, and compare it with PyTorch in onnxruntime.

    Layers that are dense at the end are cut so that their outputs on the calibration batches change least. The batch
    size stays free. FILE appears only if the outputs agree on every batch size; the execution provider that really ran
    is named.

    \b
    Example:
      dynrank-fx export digits-run -o digits.onnx
    """
    from dynrank_fx.export import export_onnx
    from dynrank_fx.precision import Precision
    from dynrank_fx.rewrite import plan_of

    from .runs import open_run, truncated

    opened = open_run(run, model_file)
    final = truncated(opened, calibrate)
    metadata = {"dynrank_plan": plan_of(opened.net).to_json()}
    if final.metric is not None:
        metadata["dynrank_metric"] = f"{final.metric:.6g}"
    report = export_onnx(
        final.module,
        opened.file.example_inputs(),
        out,
        opset=options["opset"],
        dynamic=_dynamic(options["dynamic"]),
        input_names=options["inputs"],
        output_names=options["outputs"],
        precision=Precision(options["precision"]),
        external_data=options["external_data"] or None,
        batch_sizes=options["batches"] or (1, 2, 5),
        more_inputs=final.batches[:1],
        providers=[options["provider"]] if options["provider"] else None,
        metadata=metadata,
    )
    click.echo(str(report))


def _dynamic(texts: tuple[str, ...]) -> dict[str, dict[int, str]] | None:
    """The free dimensions by argument, from ``ARG:AXIS=NAME``."""
    found: dict[str, dict[int, str]] = {}
    for text in texts:
        place, equals, name = text.partition("=")
        argument, colon, axis = place.rpartition(":")
        if not (equals and colon and argument and axis.isdigit() and name.isidentifier()):
            raise click.BadParameter(f"{text!r} is not ARG:AXIS=NAME, such as x:0=batch", param_hint="--dynamic")
        found.setdefault(argument, {})[int(axis)] = name
    return found or None
