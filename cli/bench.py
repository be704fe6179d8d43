"""``dynrank-fx bench``: how fast an ONNX file runs, alone or against another."""

from __future__ import annotations

from pathlib import Path

import click

from dynrank_fx.text import json_text

from .options import check_given_provider, given_path, json_option
from .streams import echo


@click.command()
@click.argument("file", type=given_path)
@click.option(
    "--against", type=given_path, metavar="FILE", help="Another file of the same inputs, run in turn with it."
)
@click.option("--batch", "batches", type=click.IntRange(min=1), multiple=True, help="By default 1, 8 and 32.")
@click.option("--provider", metavar="NAME", help="Of onnxruntime; by default the best there is.")
@click.option(
    "--provider-option",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Of the provider, such as enable_cuda_graph=1; may be given several times.",
)
@click.option("--repeats", type=click.IntRange(min=5), default=100, show_default=True, help="Runs that are timed.")
@json_option
def bench(
    file: Path,
    against: Path | None,
    batches: tuple[int, ...],
    provider: str | None,
    settings: tuple[str, ...],
    repeats: int,
    as_json: bool,
) -> None:
    """Time an ONNX file in onnxruntime on random inputs: median, p90 and p99, throughput, memory.

    The provider that really ran is named; one that does not come up is an error. The ratio is the median over pairs of
    neighbouring runs of FILE and the other, below 1 where FILE is faster.

    \b
    Example:
      dynrank-fx bench small.onnx --against dense.onnx
      dynrank-fx bench small.onnx --batch 1 --provider CUDAExecutionProvider --provider-option enable_cuda_graph=1
      dynrank-fx bench small.onnx --provider TensorrtExecutionProvider --provider-option trt_fp16_enable=1
    """
    if settings and provider is None:
        raise click.UsageError("--provider-option is of a provider: give --provider too")
    pairs = [setting.partition("=") for setting in settings]
    for setting, (key, equals, value) in zip(settings, pairs, strict=True):
        if not (key and equals and value):
            raise click.UsageError(f"--provider-option {setting}: write KEY=VALUE, such as enable_cuda_graph=1")
    chosen = (provider, {key: value for key, _, value in pairs}) if provider is not None and settings else provider
    from dynrank_fx.onnx import bench_onnx, onnx_machine, table

    check_given_provider(provider)

    timings = bench_onnx(
        file,
        against,
        batch_sizes=batches or (1, 8, 32),
        providers=None if chosen is None else [chosen],
        repeats=repeats,
    )
    if as_json:
        echo(json_text({"machine": onnx_machine(), "timings": [each.to_json() for each in timings]}))
    else:
        echo(f"{table(timings)}\n\n{onnx_machine()}")
