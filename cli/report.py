"""``dynrank-fx report``: a run as one HTML page."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dynrank_fx.aliases import JsonObject
from dynrank_fx.files import check_file_place
from dynrank_fx.text import json_text

from .options import given_path, json_option
from .runs import RUN_FILE, read_own_run, read_run_file
from .streams import echo

if TYPE_CHECKING:
    from dynrank_fx.report import About
    from dynrank_fx.schedules import EpochRecord


@click.command()
@click.argument("run", type=given_path)
@click.option("-o", "--out", type=given_path, metavar="FILE.HTML", help="By default <run>/report.html.")
@click.option(
    "--against", type=given_path, metavar="RUN", help="A run of the dense model (--schedule full) to compare with."
)
@json_option
def report(run: Path, out: Path | None, against: Path | None, as_json: bool) -> None:
    """Make one self-contained page of RUN, finished or not: what it cost and reached, ranks, spectra, loss, decisions.

    \b
    Example:
      dynrank-fx report digits-run -o report.html
    """
    from dynrank_fx.report import verdict, write_page
    from dynrank_fx.training import history_in, plan_in

    path = out or run / "report.html"
    check_file_place(path)
    _, info = read_own_run(run)
    history, plan = history_in(info), plan_in(info)
    about = _about(run, info, against)
    write_page(history, plan, path, title=run.resolve().name, about=about)
    said = verdict(history, plan, about)
    if as_json:
        last = {name: value for name, value in history[-1].to_json().items() if name != "switch_spectra"}
        echo(json_text({"page": str(path), "verdict": said, "next": about.then, "last": last}))
    else:
        echo(" ".join(said))
    echo(f"wrote {path}; open it in a browser", err=True)


def _about(run: Path, info: JsonObject, against: Path | None) -> About:
    from dynrank_fx.report import About

    noted: JsonObject = {"options": {}, "model_file": "MODEL.PY"}
    if (run / RUN_FILE).exists():
        noted = read_run_file(run)
    epochs, model_file = noted.get("epochs"), Path(noted["model_file"])
    facts = {"schedule": info["made_of"]["schedule"], "optimizer": info["made_of"]["optimizer"]}
    facts |= {"decided by a pilot": str(pilot.get("said"))} if (pilot := noted.get("pilot")) else {}
    facts |= {"seed": str(noted["options"]["seed"])} if "seed" in noted["options"] else {}
    facts |= {"model file": model_file.name} | noted.get("versions", {})
    words = ["dynrank-fx", "export", str(run), "-o", f"{model_file.stem}.onnx"]
    if epochs is not None and info["epoch"] < epochs:
        words = ["dynrank-fx", "train", str(model_file), "--out", str(run), "--resume"]
    dense = None if against is None else (against.name, _dense_history(against, info))
    return About(epochs, noted.get("metric", "metric"), facts, dense, shlex.join(words))


def _dense_history(against: Path, info: JsonObject) -> list[EpochRecord]:
    """The history of a dense run of the same model. Raises StoreError for any other."""
    from dynrank_fx.errors import StoreError
    from dynrank_fx.phase import Phase
    from dynrank_fx.training import history_in, plan_in

    _, other = read_own_run(against)
    history = history_in(other)
    own, its = (plan_in(each).total_params for each in (info, other))
    if own != its:
        raise StoreError(
            f"{against} is a run of another model, of {its:,} parameters where this one has {own:,}: give a dense run "
            "of the same"
        )
    if any(phase is not Phase.FULL for record in history for phase in record.phases.values()):
        raise StoreError(f"{against} did not train dense all the time: give a run that was made with --schedule full")
    return history
