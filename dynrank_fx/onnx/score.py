"""The score of a model on data, by PyTorch and of its ONNX files by onnxruntime, and whether it is more than chance."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ..aliases import Batch, Output
from ..errors import ExportError, reason
from ..tracing import Inputs, evaluating, mapped, same_buffers, tensors
from .agreement import onnx_inputs
from .session import Provider, session

_SHUFFLES = 8
_DEVIATIONS = 3  # so far above shuffled outputs is no accident


@dataclass(frozen=True)
class Scores:
    """Means of a metric over the rows of some data. pytorch: of the module. files: of each ONNX file in onnxruntime.

    chance: why the module's score is no better than chance, as a sentence, or "".
    """

    pytorch: float
    files: tuple[float, ...]
    rows: int
    chance: str


def score_onnx(
    paths: Sequence[str | os.PathLike[str]],
    module: nn.Module,
    data: Iterable[Batch],
    inputs: Callable[[Batch], Inputs],
    metric: Callable[[Output, Batch], float | Tensor],
    *,
    provider: Provider = "CPUExecutionProvider",
) -> Scores:
    """The metric of a module and of ONNX files on the same batches, each weighted by its rows.

    inputs: the model's arguments in a batch. metric: of an output and its batch, larger is better; the outputs of a
    file come to it as the module's do. Raises ExportError for files that do not take the batches.
    """
    opened = [session(path, (provider,)) for path in paths]
    sums, shuffled, rows = [0.0] * (1 + len(opened)), [0.0] * _SHUFFLES, 0
    answers: set[int] | None = set()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad(), evaluating(module):
        for batch in data:
            args, kwargs = inputs(batch)
            feeds = [onnx_inputs(each, args, kwargs) for each in opened]  # before the model may write to them
            try:
                with same_buffers(module):  # the files start from the same state each time
                    output = module(*args, **kwargs)
            except Exception as error:  # of the user's forward
                raise ExportError(
                    f"the model does not take a batch of the data ({reason(error)}): mend inputs(batch) or the data"
                ) from error
            size = next((t.shape[0] for t in tensors(output) if t.ndim), 1)
            sums[0] += size * float(metric(output, batch))
            for number, (each, given) in enumerate(zip(opened, feeds, strict=True)):
                try:
                    got = each.run(None, given)
                except Exception as error:  # onnxruntime has kinds of its own
                    raise ExportError(
                        f"{os.fspath(paths[number])} cannot be run on a batch of {size} ({reason(error)}): export it "
                        "with these dimensions free"
                    ) from error
                sums[1 + number] += size * float(metric(_like(output, got), batch))
            for number in range(_SHUFFLES):
                order = torch.randperm(size, generator=generator)
                shuffled[number] += size * float(metric(_rows(output, order), batch))
            answers = _answers(output, answers)
            rows += size
    if not rows:
        raise ExportError("the data gave no batch to score on: give one or more")
    pytorch, *files = (total / rows for total in sums)
    return Scores(pytorch, tuple(files), rows, _chance(pytorch, [total / rows for total in shuffled], answers, rows))


def _like(output: Output, arrays: Sequence[np.ndarray]) -> Output:
    """What a file gave, in the form of the module's output: a file has the tensors of it, in order."""
    values = iter(arrays)
    return mapped(lambda _: torch.from_numpy(np.asarray(next(values))), output)


def _rows(output: Output, order: Tensor) -> Output:
    """The rows of an output in another order."""
    return mapped(lambda t: t[order.to(t.device)] if t.ndim and len(t) == len(order) else t, output)


def _answers(output: Output, before: set[int] | None) -> set[int] | None:
    """The classes that an output of scores [rows, classes] names, beside those before; None for another output."""
    first = next(iter(tensors(output)), None)
    if before is None or first is None or first.ndim != 2 or first.shape[1] < 2:
        return None
    return before | set(first.argmax(1).tolist())


def _chance(score: float, shuffled: Sequence[float], answers: set[int] | None, rows: int) -> str:
    """Why a score tells nothing, or "". Where the order of the outputs makes no difference at all, as with one row in a
    batch, that cannot be told, unless all answers are the same.
    """
    if not all(map(math.isfinite, (score, *shuffled))):
        return ""
    mean, deviation = statistics.fmean(shuffled), statistics.pstdev(shuffled)
    if deviation == 0 and score == mean:
        if answers is None or len(answers) > 1 or rows < 2:
            return ""
        return (
            f"the model gives all {rows} examples the same answer, so that its metric ({score:.4g}) says nothing of it"
        )
    if score > mean + _DEVIATIONS * deviation:
        return ""
    return (
        f"the metric ({score:.4g}) is at chance, since with the outputs shuffled among the examples it is {mean:.4g}: "
        "see that the model is trained, and that larger is better"
    )
