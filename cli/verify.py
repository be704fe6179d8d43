"""``dynrank-fx verify``: whether two ONNX files, or a file and its model, compute the same."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dynrank_fx.errors import ExportError
from dynrank_fx.text import json_text

from .options import Option, calibrate_option, check_given_provider, given_path, json_option, weights_option
from .streams import echo

if TYPE_CHECKING:
    from .runs import FinalForm


@click.command()
@click.argument("one", type=given_path)
@click.argument("other", type=given_path)
@click.option("--batch", "batches", type=click.IntRange(min=1), multiple=True, help="By default 1, 2 and 5.")
@click.option("--tolerance", type=float, default=1e-4, show_default=True, help="Of the relative error of an output.")
@click.option(
    "--model", "model_file", type=given_path, metavar="MODEL.PY", help="The model file of a run or a .pt file."
)
@weights_option
@calibrate_option
@click.option("--metric", is_flag=True, help="Also score both on eval_data() by metric(): what is deployed, itself.")
@json_option
@click.option("--provider", default="CPUExecutionProvider", show_default=True, help="Of onnxruntime.")
def verify(
    one: Path,
    other: Path,
    batches: tuple[int, ...],
    tolerance: float,
    metric: bool,
    as_json: bool,
    provider: str,
    **options: Option,
) -> None:
    """Compare an ONNX file with another, or with a model file, a run or a .pt file, on random inputs.

    Says how far every output is off, and names the first layer whose value differs. Exits with 1 where they differ. A
    .pt file of `compress` takes --model, and runs code as it is loaded: only one of your own.

    \b
    Example:
      dynrank-fx verify small.onnx dense.onnx --tolerance 0.05
      dynrank-fx verify dense.onnx model.py --weights model.pt
      dynrank-fx verify int8.onnx digits-run --metric
    """
    from dynrank_fx.onnx import compare_onnx

    if not 0 <= tolerance < float("inf"):
        raise click.BadParameter(
            f"{tolerance} is no error that can be allowed: give 0 or more", param_hint="--tolerance"
        )
    if ".onnx" not in (one.suffix, other.suffix):
        raise click.UsageError(f"neither {one} nor {other} is an .onnx file: export one of them first")
    # What would stop the comparison is said before the other side is exported for it.
    check_given_provider(provider)
    for each in (one, other):
        if each.suffix == ".onnx" and not each.is_file():
            raise ExportError(f"there is no file {each}: export it first")
    of_torch = next((each for each in (one, other) if each.suffix != ".onnx"), None)
    final = None if of_torch is None else _final(of_torch, **options)
    if metric and final is None:
        if options["model_file"] is None:
            raise click.UsageError(
                "--metric takes a model file, for its eval_data() and metric(): add --model MODEL.PY"
            )
        final = _final(options["model_file"], **options | {"model_file": None})
    if metric and final is not None:
        final.file.require("eval_data", "metric", command="--metric")
    with tempfile.TemporaryDirectory() as folder:
        files = [each if each.suffix == ".onnx" else _exported(each, Path(folder), final) for each in (one, other)]
        verdict = compare_onnx(*files, batch_sizes=batches or (1, 2, 5), provider=provider, tolerance=tolerance)
    scores = _scores((one, other), final, provider) if metric and final is not None else {}
    if as_json:
        echo(json_text({**verdict.to_json(), "metric": scores}))
    else:
        echo("\n".join([str(verdict), *(f"metric {value:.4f}  {name}" for name, value in scores.items())]))
    if not verdict.same:
        raise ExportError(f"{one} and {other} differ by more than {tolerance:g}")


def _final(source: Path, model_file: Path | None, weights: Path | None, calibrate: int) -> FinalForm:
    from .runs import final_form

    return final_form(source, model_file, weights, calibrate)


def _exported(source: Path, folder: Path, final: FinalForm | None) -> Path:
    """The final form of what is no ONNX file, as one."""
    from dynrank_fx.onnx import export_onnx

    assert final is not None
    path = folder / f"{source.stem}.onnx"
    export_onnx(final.module, final.file.example_inputs(), path)
    return path


def _scores(sides: tuple[Path, Path], final: FinalForm, provider: str) -> dict[str, float]:
    """The metric of each side by its name: of ONNX files in onnxruntime, of the other in PyTorch."""
    from dynrank_fx.onnx import score_onnx

    paths = [each for each in dict.fromkeys(sides) if each.suffix == ".onnx"]
    data, metric = final.file.eval_data(), final.file.metric
    assert data is not None
    assert metric is not None
    scores = score_onnx(paths, final.module, data, final.file.inputs, metric, provider=provider)
    if scores.chance:
        echo(f"Warning: {scores.chance}", err=True)
    named = {f"{path} in onnxruntime": value for path, value in zip(paths, scores.files, strict=True)}
    torch_side = next((str(each) for each in sides if each.suffix != ".onnx"), final.file.path.name)
    return {**named, f"{torch_side} in PyTorch": scores.pytorch}
