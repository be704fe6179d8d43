"""What is suspicious about a model and its data, in sentences that are printed as warnings before any work."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from dynrank_fx.errors import ModelFileError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dynrank_fx.aliases import Batch

    from .modelfile import ModelFile

_BATCHES = 4  # of each data, which is enough to tell another scale
_EXAMPLES = 64  # are enough to tell a metric from chance
_FAR = 10.0  # so many deviations, or so many times the deviation


def suspicions(file: ModelFile, model: nn.Module, batches: Sequence[Batch]) -> list[str]:
    """What is suspicious, before a model is cut on these calibration batches."""
    some = list(batches[:_BATCHES])
    said = [_other_scale(file, some), _no_lower_loss(file, model, some), _chance(file, model)]
    return [sentence for sentence in said if sentence]


def _chance(file: ModelFile, model: nn.Module) -> str:
    """Where the model's metric on eval_data() is no better than with its outputs shuffled."""
    from dynrank_fx.onnx import score_onnx

    if not file.has("eval_data") or file.metric is None:
        return ""
    batches = _of_enough(file, file.first_batches("eval_data", 4 * _BATCHES))
    return score_onnx((), model, batches, file.inputs, file.metric).chance


def _of_enough(file: ModelFile, batches: Sequence[Batch]) -> list[Batch]:
    """The first batches that have enough examples to tell a metric from chance, or all."""
    from dynrank_fx.tracing import batch_size

    kept: list[Batch] = []
    seen = 0
    for batch in batches:
        if seen >= _EXAMPLES and len(kept) >= _BATCHES:
            break
        kept.append(batch)
        seen += batch_size(file.inputs(batch)) or 1
    return kept


def _other_scale(file: ModelFile, batches: Sequence[Batch]) -> str:
    """Where calibration batches are of another scale than the data of evaluation, or else of training."""
    name = next((name for name in ("eval_data", "train_data") if file.has(name)), None)
    if name is None or not batches:
        return ""
    its_own = file.first_batches(name, _BATCHES)
    with file.guard("comparing the calibration data"):
        figures = list(zip(_figures(file, batches), _figures(file, its_own), strict=False))
    for place, (mine, its) in enumerate(figures):
        if _is_far(mine, its):
            return (
                f"the calibration data are unlike {name}(): input {place} has a mean of {mine[0]:.3g} and a deviation "
                f"of {mine[1]:.3g}, and there {its[0]:.3g} and {its[1]:.3g}: scale them alike"
            )
    return ""


def _no_lower_loss(file: ModelFile, model: nn.Module, batches: Sequence[Batch]) -> str:
    """Where the weights of a file are no better on the calibration batches than none."""
    if file.weights is None or not file.has("loss") or not batches:
        return ""
    with suppress(ModelFileError):  # calibration_data() may have no labels
        trained, fresh = _loss(file, model, batches), _loss(file, replace(file, weights=None).model(), batches)
        if trained >= fresh:
            return (
                f"on the calibration data the loss of the weights ({trained:.3g}) is no lower than that of model() "
                f"without them ({fresh:.3g}): are they data that it was trained on?"
            )
    return ""


def _figures(file: ModelFile, batches: Iterable[Batch]) -> list[tuple[float, float]]:
    """Mean and deviation of each input of floats."""
    import torch

    from dynrank_fx.tracing import tensors

    by_place: list[list[Tensor]] = []
    for batch in batches:
        floats = [each for each in tensors(file.inputs(batch)) if each.is_floating_point() and each.numel() > 1]
        by_place.extend([] for _ in range(len(floats) - len(by_place)))
        for place, leaf in enumerate(floats):
            by_place[place].append(leaf.detach().flatten().double().cpu())
    joined = [torch.cat(leaves) for leaves in by_place]
    return [(float(values.mean()), float(values.std())) for values in joined]


def _is_far(mine: tuple[float, float], its: tuple[float, float]) -> bool:
    (mean, deviation), (other, spread) = mine, its
    if not spread > 0:
        return False
    return abs(mean - other) > _FAR * spread or deviation > _FAR * spread or deviation < spread / _FAR


def _loss(file: ModelFile, model: nn.Module, batches: Sequence[Batch]) -> float:
    import torch

    from dynrank_fx.tracing import evaluating, same_buffers

    losses = []
    with torch.no_grad(), evaluating(model):
        for batch in batches:
            args, kwargs = file.inputs(batch)
            with same_buffers(model):
                losses.append(float(file.loss(model(*args, **kwargs), batch)))
    return sum(losses) / max(len(losses), 1)
