"""``dynrank-fx report``: a run as one HTML page."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("run", type=Path)
@click.option("-o", "--out", type=Path, metavar="FILE.HTML", help="By default <run>/report.html.")
def report(run: Path, out: Path | None) -> None:
    """Make one self-contained page of RUN, finished or not: ranks, spectra, loss, compute and decisions, with pictures.

    \b
    Example:
      dynrank-fx report digits-run -o report.html
    """
    from dynrank_fx.report import write_page
    from dynrank_fx.training import history_in, plan_in, read_run

    _, info = read_run(run)
    path = out or run / "report.html"
    write_page(history_in(info), plan_in(info), path, title=run.resolve().name)
    click.echo(f"wrote {path}; open it in a browser", err=True)
