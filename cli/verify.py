"""``dynrank-fx verify``: whether two ONNX files, or a file and its model, compute the same."""

from __future__ import annotations

import tempfile
from pathlib import Path

import click

from dynrank_fx.errors import ExportError

from .options import Option, calibrate_option, weights_option


@click.command()
@click.argument("one", type=Path)
@click.argument("other", type=Path)
@click.option("--batch", "batches", type=click.IntRange(min=1), multiple=True, help="By default 1, 2 and 5.")
@click.option("--tolerance", type=float, default=1e-4, show_default=True, help="Of the relative error of an output.")
@click.option("--model", "model_file", type=Path, metavar="MODEL.PY", help="The model file of a run or a .pt file.")
@weights_option
@calibrate_option
@click.option("--provider", default="CPUExecutionProvider", show_default=True, help="Of onnxruntime.")
def verify(
    one: Path, other: Path, batches: tuple[int, ...], tolerance: float, provider: str, **options: Option
) -> None:
    """Compare an ONNX file with another, or with a model file, a run or a .pt file, on random inputs.

    Says how far every output is off, and names the first layer whose value differs. Exits with 1 where they differ. A
    .pt file of `compress` takes --model, and runs code as it is loaded: only one of your own.

    \b
    Example:
      dynrank-fx verify small.onnx dense.onnx --tolerance 0.05
      dynrank-fx verify dense.onnx model.py --weights model.pt
    """
    from dynrank_fx.onnx import check_provider, compare_onnx

    if not 0 <= tolerance < float("inf"):
        raise click.BadParameter(
            f"{tolerance} is no error that can be allowed: give 0 or more", param_hint="--tolerance"
        )
    if ".onnx" not in (one.suffix, other.suffix):
        raise click.UsageError(f"neither {one} nor {other} is an .onnx file: export one of them first")
    # What would stop the comparison is said before the other side is exported for it.
    check_provider(provider)
    for each in (one, other):
        if each.suffix == ".onnx" and not each.is_file():
            raise ExportError(f"there is no file {each}: export it first")
    with tempfile.TemporaryDirectory() as folder:
        files = [each if each.suffix == ".onnx" else _exported(each, Path(folder), **options) for each in (one, other)]
        verdict = compare_onnx(*files, batch_sizes=batches or (1, 2, 5), provider=provider, tolerance=tolerance)
    click.echo(str(verdict))
    if not verdict.same:
        raise ExportError(f"{one} and {other} differ by more than {tolerance:g}")


def _exported(source: Path, folder: Path, model_file: Path | None, weights: Path | None, calibrate: int) -> Path:
    """The final form of what is no ONNX file, as one."""
    from dynrank_fx.onnx import export_onnx

    from .runs import final_form

    path, final = folder / f"{source.stem}.onnx", final_form(source, model_file, weights, calibrate)
    export_onnx(final.module, final.file.example_inputs(), path)
    return path
