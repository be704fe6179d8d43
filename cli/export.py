"""``dynrank-fx export``: from a run to an ONNX file that onnxruntime agrees with."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("run", type=Path)
@click.option("--out", "-o", type=Path, required=True, metavar="FILE", help="The ONNX file to write.")
@click.option("--model", "model_file", type=Path, metavar="MODEL.PY", help="The model file, where it has moved.")
@click.option("--opset", type=int, metavar="N", help="ONNX opset; by default the exporter's own.")
@click.option("--batch", "batches", type=int, multiple=True, help="A batch size to compare on; by default 1, 2 and 5.")
@click.option("--provider", metavar="NAME", help="An execution provider of onnxruntime; by default the best there is.")
def export(
    run: Path, out: Path, model_file: Path | None, opset: int | None, batches: tuple[int, ...], provider: str | None
) -> None:
    """Truncate a run (or a folder of `transform`), export it, and compare it with PyTorch in onnxruntime.

    The batch size stays free. FILE appears only if the outputs agree on every batch size; the execution provider that
    really ran is named.

    \b
    Example:
      dynrank-fx export digits-run -o digits.onnx
    """
    from dynrank_fx.export import export_onnx
    from dynrank_fx.rewrite import plan_of
    from dynrank_fx.truncation import truncate

    from .runs import open_run

    opened = open_run(run, model_file)
    report = export_onnx(
        truncate(opened.net),
        opened.file.example_inputs(),
        out,
        opset=opset,
        batch_sizes=batches or (1, 2, 5),
        providers=[provider] if provider else None,
        metadata={"dynrank_plan": plan_of(opened.net).to_json()},
    )
    click.echo(str(report))
