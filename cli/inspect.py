"""``dynrank-fx inspect``: the matrices of a model, a run or an ONNX file: spectra, ranks, and where factoring pays."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from dynrank_fx.files import check_file_place

from .options import capture_of, capture_option, given_path, json_option, weights_option
from .streams import echo

if TYPE_CHECKING:
    from dynrank_fx.schedules import EpochRecord


@click.command()
@click.argument("target", type=given_path)
@click.option(
    "--model", "model_file", type=given_path, metavar="MODEL.PY", help="The model file of a run, where it has moved."
)
@weights_option
@capture_option
@click.option(
    "--plot", type=given_path, metavar="FILE.PNG", help="Draw the spectra; of a run also ranks and loss by epoch."
)
@json_option
def inspect(
    target: Path, model_file: Path | None, weights: Path | None, how: str | None, plot: Path | None, as_json: bool
) -> None:
    """Show every matrix of TARGET (MODEL.PY, a run, a folder of `transform`, or a MODEL.ONNX).

    Two columns say how many directions a weight uses, by its singular values. Effective rank: exp of the entropy of
    their shares in their sum. Stable rank: the sum of their squares over the largest square. Where 95 % energy is below
    break-even, two factors hold most of the weight in fewer parameters. Lines below the table explain its columns.

    \b
    Example:
      dynrank-fx inspect samples/digits.py --plot spectra.png
    """
    from dynrank_fx.report import inspect_net, inspect_onnx, matrices_json, matrices_table

    from .runs import open_run

    if plot is not None:
        check_file_place(plot)
    history: list[EpochRecord] = []
    for flag, value in (("--weights", weights), ("--capture", how)):
        if value is not None and target.suffix != ".py":
            raise click.UsageError(f"{flag} is of a model file, and {target} is none: leave it out")
    if target.suffix == ".onnx":
        rows = inspect_onnx(target)
    elif target.suffix == ".py":
        from dynrank_fx.tracing import capture

        from .modelfile import load_model_file

        file = load_model_file(target, weights)
        net = capture(file.model(), file.example_inputs(), how=capture_of(how))
        rows = inspect_net(net, file.example_inputs())
    else:
        opened = open_run(target, model_file)
        rows, history = inspect_net(opened.net, opened.file.example_inputs()), opened.history
    if plot:
        from dynrank_fx.report import plot_run, plot_spectra

        if history:
            plot_run(history, plot)
        else:
            plot_spectra(rows, plot)
        echo(f"drew {plot}", err=True)
    echo(matrices_json(rows) if as_json else matrices_table(rows))
