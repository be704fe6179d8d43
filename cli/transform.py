"""``dynrank-fx transform``: what would be factored, and the folder that training starts from."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from .options import (
    Option,
    amp_option,
    compile_option,
    given_options,
    given_path,
    json_option,
    measure_option,
    plan_options,
    transformed,
    weights_option,
)
from .streams import echo


@click.command()
@click.argument("model_file", type=given_path)
@weights_option
@plan_options
@measure_option
@click.option("--device", default="cpu", show_default=True, help="Where --measure measures: cpu, cuda, cuda:1, ...")
@amp_option
@compile_option
@click.option("--no-compile", is_flag=True, help="For --measure, where the net will run eagerly.")
@click.option("--out", "-o", type=given_path, metavar="FOLDER", help="Where to write; by default <model>-dynrank.")
@click.option("--dry-run", is_flag=True, help="Print the plan and write nothing.")
@json_option
def transform(model_file: Path, out: Path | None, dry_run: bool, as_json: bool, **options: Option) -> None:
    """Plan which weights are factored, print it, and write the rewritten model as a folder.

    The folder holds plan.json (edit it and give it back by --plan), the weights as safetensors, and the graph as
    readable text. `dynrank-fx train --from FOLDER` and dr.load read it.

    \b
    Example:
      dynrank-fx transform samples/digits.py --rank 0.25 --exclude 'stem*' --dry-run
    """
    from dynrank_fx.phases import check_place, save
    from dynrank_fx.rewrite import plan_of

    from .modelfile import load_model_file

    for parameter in [] if options["measure"] else given_options(("device", "amp", "compile", "no_compile")):
        raise click.UsageError(
            f"{parameter.opts[0]} says where --measure measures: give --measure too, or leave it out"
        )
    folder = out or Path(f"{model_file.stem}-dynrank")
    if not dry_run:
        check_place(folder)
    net = transformed(load_model_file(model_file, options["weights"]), options, allow_empty=dry_run)
    plan = plan_of(net)
    if not dry_run:
        save(net, folder)
    echo(plan.to_json().rstrip() if as_json else str(plan))
    if not dry_run:
        echo(f"\nwrote {folder}/ (plan.json, weights.safetensors, graph.txt)", err=True)
    if not as_json:
        then = shlex.join(["dynrank-fx", "train", str(model_file), "--from", str(folder)])
        echo(f"next: {'the same without --dry-run, then ' if dry_run else ''}{then}")
