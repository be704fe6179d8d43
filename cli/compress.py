"""``dynrank-fx compress``: a trained model, of any training, made smaller or faster within a budget."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dynrank_fx.errors import StoreError

from .options import calibrate_option
from .runs import metric_of

if TYPE_CHECKING:
    from torch import nn

    from dynrank_fx.compression import MaxDrop
    from dynrank_fx.ranks import RankPolicy

    from .modelfile import ModelFile


@click.command()
@click.argument("source", type=Path)
@click.option(
    "--budget",
    required=True,
    metavar="OF=SHARE",
    help="params=0.5, flops=0.5 or latency=0.7 of the dense model, or max_drop=0.01 of the metric.",
)
@click.option("--out", "-o", type=Path, required=True, metavar="FILE", help="model.onnx, or model.pt for PyTorch.")
@click.option("--weights", type=Path, metavar="FILE", help="A state_dict for model(): .pt or .safetensors.")
@click.option("--model", "model_file", type=Path, metavar="MODEL.PY", help="A run's model file, where it has moved.")
@calibrate_option
@click.option("--sequential", is_flag=True, help="Calibrate every layer on what the cut ones before it give.")
@click.option(
    "--recover-steps", type=click.IntRange(min=0), default=0, metavar="N", help="Fine-tune the result for N steps."
)
@click.option(
    "--recover-by",
    type=click.Choice(["outputs", "loss"]),
    default="outputs",
    show_default=True,
    help="Towards the dense model's outputs, or by the file's loss.",
)
@click.option("--provider", default="CPUExecutionProvider", show_default=True, help="Where it will run, and is timed.")
@click.option("--no-timing", is_flag=True, help="Measure nothing: sites are not put back for being slow.")
@click.option("--include", multiple=True, metavar="PATTERN", help="Only weights whose name fits; may be repeated.")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="No weights whose name fits; may be repeated.")
@click.option("--multiple-of", type=click.IntRange(min=1), default=1, metavar="N", help="Ranks are multiples of N.")
@click.option(
    "--leave",
    multiple=True,
    type=click.Choice(["stem", "shortcut", "head", "none"]),
    default=("none",),
    show_default=True,
    help="Weights that stay dense by what they are for; may be repeated.",
)
def compress(source: Path, budget: str, out: Path, **options: Any) -> None:
    """Cut a trained model so that its outputs change least, within a budget; SOURCE is a model file or a run.

    model() (with --weights, or as it is) has to be trained. Where eval_data() and metric() are there, both models are
    scored. A layer that is not faster in onnxruntime with factors stays dense, and the whole is never slower than it
    was, unless the budget is one of parameters, which then says so.

    \b
    Example:
      dynrank-fx compress digits.py --weights digits.pt --budget flops=0.5 -o small.onnx
    """
    from dynrank_fx.compression import compress as compressed
    from dynrank_fx.roles import Role
    from dynrank_fx.sitetimes import SiteTimes

    asked = _budget(budget)
    if out.suffix not in (".onnx", ".pt"):
        raise click.BadParameter(f"{out} is neither an .onnx nor a .pt file", param_hint="--out")
    if not out.parent.is_dir():
        raise StoreError(f"{out} cannot be written because there is no folder {out.parent}: make it first")
    net, file = _opened(source, options["model_file"], options["weights"])
    batches = file.calibration_batches(options["calibrate"])
    by_loss = options["recover_by"] == "loss" and options["recover_steps"]
    found = compressed(
        net,
        file.example_inputs(),
        asked,
        [file.inputs(batch) for batch in batches] or None,
        metric=metric_of(file),
        recover_steps=options["recover_steps"],
        loss=_loss(file, batches) if by_loss else None,
        times=None if options["no_timing"] else SiteTimes(options["provider"]),
        multiple_of=options["multiple_of"],
        include=options["include"],
        exclude=options["exclude"],
        leave=[Role[name.upper()] for name in options["leave"] if "none" not in options["leave"]],
        sequential=options["sequential"],
    )
    click.echo(str(found))
    click.echo()
    click.echo(_written(found, file, out, options["provider"]))


def _budget(text: str) -> RankPolicy | MaxDrop:
    from dynrank_fx.budget import Budget
    from dynrank_fx.compression import MaxDrop

    what, _, number = text.partition("=")
    try:
        value = float(number)
    except ValueError:
        value = None
    if what not in ("params", "flops", "latency", "max_drop") or value is None:
        raise click.BadParameter(
            f"{text!r} is none: give params=0.5, flops=0.5, latency=0.7 or max_drop=0.01", param_hint="--budget"
        )
    shares: dict[str, Any] = {what: value}
    return MaxDrop(value) if what == "max_drop" else Budget(**shares)


def _opened(source: Path, model_file: Path | None, weights: Path | None) -> tuple[nn.Module, ModelFile]:
    from .modelfile import load_model_file
    from .runs import open_run

    if source.is_dir():
        if weights is not None:
            raise click.UsageError("a run has its own weights: leave out --weights")
        opened = open_run(source, model_file)
        return opened.net, opened.file
    file = load_model_file(source)
    model = file.model()
    if weights is not None:
        _load_weights(model, weights)
    return model, file


def _load_weights(model: nn.Module, path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
        model.load_state_dict(state)
    except FileNotFoundError as error:
        raise StoreError(f"there is no file {path}") from error
    except Exception as error:
        lines = str(error).strip().splitlines()
        what = (
            "it is no file of tensors alone"
            if "weights_only" in str(error)
            else " ".join(map(str.strip, lines[1:3] or lines))
        )
        raise StoreError(
            f"{path} could not be loaded into model() ({what[:200]}): give a state_dict of that model"
        ) from error


def _loss(file: ModelFile, batches: list[Any]) -> Any:
    file.require("loss", command="--recover-by loss")
    return lambda output, number: file.loss(output, batches[number])


def _written(found: Any, file: ModelFile, out: Path, provider: str) -> str:
    from dynrank_fx.export import export_onnx
    from dynrank_fx.store import replacing

    if out.suffix == ".pt":
        import torch

        stored = io.BytesIO()  # torch's own writer does not say that a disk is full
        torch.save(found.module, stored)
        with replacing(out) as beside:
            beside.write_bytes(stored.getbuffer())
        return f"{out}: a PyTorch module, for torch.load(..., weights_only=False)"
    metadata = {"dynrank_plan": found.plan.to_json()}
    if found.metrics is not None:
        metadata["dynrank_metric"] = f"{found.metrics[1]:.6g} (dense: {found.metrics[0]:.6g})"
    return str(export_onnx(found.module, file.example_inputs(), out, providers=[provider], metadata=metadata))
