"""``dynrank-fx verify``: whether two ONNX files, or a file and its model, compute the same."""

from __future__ import annotations

import tempfile
from pathlib import Path

import click

from dynrank_fx.errors import ExportError

from .options import calibrate_option


@click.command()
@click.argument("one", type=Path)
@click.argument("other", type=Path)
@click.option("--batch", "batches", type=click.IntRange(min=1), multiple=True, help="By default 1, 2 and 5.")
@click.option("--tolerance", type=float, default=1e-4, show_default=True, help="Of the relative error of an output.")
@calibrate_option
@click.option("--provider", default="CPUExecutionProvider", show_default=True, help="Of onnxruntime.")
def verify(one: Path, other: Path, batches: tuple[int, ...], tolerance: float, calibrate: int, provider: str) -> None:
    """Compare an ONNX file with another, or with a model file or run, on random inputs of several batch sizes.

    Says how far every output is off, and names the first layer whose value differs. Exits with 1 where they differ.

    \b
    Example:
      dynrank-fx verify small.onnx dense.onnx --tolerance 0.05
    """
    from dynrank_fx.onnxdiff import compare_onnx

    if not 0 <= tolerance < float("inf"):
        raise click.BadParameter(
            f"{tolerance} is no error that can be allowed: give 0 or more", param_hint="--tolerance"
        )
    given = other
    with tempfile.TemporaryDirectory() as folder:
        if other.suffix != ".onnx":
            other = _exported(other, Path(folder), calibrate)
        verdict = compare_onnx(one, other, batch_sizes=batches or (1, 2, 5), provider=provider, tolerance=tolerance)
    click.echo(str(verdict))
    if not verdict.same:
        raise ExportError(f"{one} and {given} differ by more than {tolerance:g}")


def _exported(source: Path, folder: Path, calibrate: int) -> Path:
    """The model of a model file, or of a run, as an ONNX file."""
    from dynrank_fx.export import export_onnx

    from .modelfile import load_model_file
    from .runs import open_run, truncated

    path = folder / f"{source.stem}.onnx"
    if source.is_dir():
        opened = open_run(source)
        export_onnx(truncated(opened, calibrate).module, opened.file.example_inputs(), path)
    else:
        file = load_model_file(source)
        export_onnx(file.model(), file.example_inputs(), path)
    return path
