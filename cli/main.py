"""The command ``dynrank-fx``: a group of thin commands; a user's mistake is one sentence and exit code 1."""

from __future__ import annotations

import sys
import traceback
import warnings
from typing import TextIO

import click

from dynrank_fx.errors import DynrankError, DynrankWarning, ModelFileError, first_line
from dynrank_fx.text import printable
from dynrank_fx.version import __version__

from .bench import bench
from .compress import compress
from .export import export
from .failures import blamed, of_the_machine
from .inspect import inspect
from .pilot import pilot
from .report import report
from .several import OfAnotherError, is_told_here, of_another, refuse_several, say
from .streams import echo, lasting_streams
from .train import train
from .transform import transform
from .verify import verify


class _Commands(click.Group):
    """Prints a DynrankError, and what a model file raised, as a sentence; anything else is ours, and keeps its
    traceback.
    """

    def invoke(self, ctx: click.Context) -> object:
        try:
            return self._in_words(ctx)
        except click.ClickException as error:
            if not is_told_here(error.format_message()):
                raise click.exceptions.Exit(error.exit_code) from error
            raise

    def _in_words(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except (Exception, SystemExit) as error:
            told = of_another(error) or (error if isinstance(error, DynrankError) else None)
            told = told or blamed(error) or of_the_machine(error)
            if told is None:
                raise
            if ctx.params["traceback"]:
                echo("".join(traceback.format_exception(error)), err=True)
            elif isinstance(told, ModelFileError) and (told is not error or told.__cause__ is not None):
                echo("Try 'dynrank-fx --traceback COMMAND ...' for all the calls before the error.", err=True)
            if isinstance(told, OfAnotherError):
                raise click.exceptions.Exit(1) from error
            raise click.ClickException(printable(str(told))) from error


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="dynrank-fx")
@click.option("--traceback", is_flag=True, help="Before an error, print Python's traceback too.")
@click.pass_context
def cli(ctx: click.Context, traceback: bool) -> None:
    """Train with dynamic rank: factor a model, train it in LOW and FULL phases, truncate it, export it to ONNX.

    \b
    dynrank-fx transform model.py           what would be factored, and what it saves
    dynrank-fx pilot model.py               which way to train is worth a long run, by short ones
    dynrank-fx train model.py --out run     train by a schedule, with checkpoints
    dynrank-fx report run                   one page with pictures of what happened
    dynrank-fx export run -o model.onnx     truncate, export, compare in onnxruntime
    dynrank-fx inspect run --plot rank.png  spectra and ranks
    dynrank-fx compress model.py --budget flops=0.5 -o small.onnx
                                            make any trained model smaller, without phase training
    dynrank-fx verify a.onnx b.onnx         whether they compute the same, and which layer does not
    dynrank-fx bench a.onnx --against b.onnx
                                            latency, throughput, and the ratio of neighbouring runs

    model.py defines model() and example_inputs(); to train also train_data() and loss(output, batch).
    """
    refuse_several(ctx.invoked_subcommand or "", but=("train",))
    _quieten()


def _quieten() -> None:
    """Our warnings as one line each; those that libraries raise about themselves are not for this user."""
    show = warnings.showwarning

    def one_line(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if issubclass(category, DynrankWarning):
            say(f"Warning: {message}")
        else:
            show(message, category, filename, lineno, file, line)

    warnings.showwarning = one_line
    for category in (FutureWarning, DeprecationWarning, PendingDeprecationWarning):
        warnings.filterwarnings("ignore", category=category, module=r"(torch|onnx|copyreg)")


for command in (transform, pilot, train, report, export, inspect, compress, verify, bench):
    cli.add_command(command)


def main() -> None:
    """The entry point of the installed command."""
    printed = lasting_streams()
    try:
        cli(prog_name="dynrank-fx")
    finally:
        printed.flush()
        if printed.lost is not None and printed.failed:
            echo(f"Error: a part of what was printed is lost ({first_line(printed.lost)})", err=True)
            sys.exit(1)
