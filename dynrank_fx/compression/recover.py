"""A short fine-tune of a truncated module, towards the outputs of the dense one or by a loss of one's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor, nn

from ..aliases import Output
from ..checks import is_list, is_whole
from ..errors import CalibrationError
from ..tracing import ExampleInputs, same_buffers, tensors, unwrap
from .batches import call, checked_batches

Loss: TypeAlias = Callable[[Output, int], Tensor]
"""(output, number of the calibration batch it is of) to the loss."""

_SHARE = 0.01  # of the root mean square of a parameter: the largest step of one of its numbers


def recover_(
    module: nn.Module,
    dense: nn.Module,
    batches: Iterable[ExampleInputs],
    steps: int,
    *,
    loss: Loss | None = None,
    names: Sequence[str] | None = None,
) -> list[float]:
    """Fine-tune a truncated module in evaluation mode: dropout off, batch norms as they are.

    The largest change of a parameter in a step is a hundredth of its root mean square (Adam), falling to zero along a
    cosine.

    Args:
        module: The truncated module.
        dense: The module before the cut.
        batches: Batches of inputs, taken in turn.
        steps: How many steps, 0 or more.
        loss: (output, number of the calibration batch it is of) to a loss. By default the distance to the dense model's
            outputs, Σ ‖z − y‖² / ‖y − ȳ‖² over its floating-point outputs, ȳ being the mean over the batch.
        names: The parameters to train; all by default.

    Returns:
        The loss of every step.

    Raises:
        CalibrationError: For data and names that do not fit, and where the loss is not finite or has no gradient; the
            module is then as it was.
    """
    data = checked_batches(batches)
    wanted = dict(unwrap(module).named_parameters())
    unwrap(dense)  # which refuses what is no module
    if loss is not None and not callable(loss):
        raise CalibrationError(f"loss is {loss!r}: give a function, or leave it out")
    asked: Collection[object] = wanted if names is None else names if is_list(names) else [names]
    unknown = [name for name in asked if not isinstance(name, str) or name not in wanted]
    if unknown:
        raise CalibrationError(
            f"the module has no parameter {', '.join(map(str, unknown))}: its names are like {next(iter(wanted))}"
        )
    if not is_whole(steps):
        raise CalibrationError(f"a recovery of {steps!r} steps is none: give 0 or more")
    chosen = [wanted[name] for name in wanted if name in asked]
    chosen = [parameter for parameter in chosen if parameter.is_floating_point()]
    before = [parameter.detach().clone() for parameter in chosen]
    losses: list[float] = []
    groups = [{"params": [p], "lr": _SHARE * max(float(p.detach().square().mean().sqrt()), 1e-4)} for p in chosen]
    with _training(module, chosen):
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: (1 + math.cos(math.pi * step / max(steps, 1))) / 2
        )
        try:
            for step in range(steps):
                with same_buffers(module), same_buffers(dense):  # to the end of backward, which may need them
                    lost = _lost(module, dense, data, step % len(data), loss)
                    losses.append(float(lost.detach()))
                    if not math.isfinite(losses[-1]):
                        raise CalibrationError(
                            f"the loss of the recovery is {losses[-1]} at step {step}: look for a loss that overflows, "
                            "or leave the recovery out"
                        )
                    optimizer.zero_grad()
                    lost.backward()
                optimizer.step()
                scheduler.step()
            if not all(bool(torch.isfinite(parameter).all()) for parameter in chosen):
                raise CalibrationError(
                    "the recovery came to weights that are not finite: look for a gradient that overflows, or leave "
                    "the recovery out"
                )
        except BaseException:
            with torch.no_grad():
                for parameter, value in zip(chosen, before, strict=True):
                    parameter.copy_(value)
            raise
    return losses


def _lost(module: nn.Module, dense: nn.Module, data: Sequence[ExampleInputs], number: int, loss: Loss | None) -> Tensor:
    """The loss on one batch."""
    output = call(module, data[number], number)
    if loss is None:
        with torch.no_grad():
            target = call(dense, data[number], number)
        return distance(output, target)
    value = loss(output, number)
    if not (isinstance(value, Tensor) and value.requires_grad):
        raise CalibrationError(
            "the loss of the recovery has no gradient: compute it from the output by torch's operations, without "
            "item(), float() or detach()"
        )
    return value


def distance(output: Output, target: Output) -> Tensor:
    """How far outputs are from those wanted, in parts of what those vary by over the batch."""
    total = torch.zeros(())
    for z, y in zip(tensors(output), tensors(target), strict=True):
        if y.is_floating_point():
            finite = y.isfinite()
            spread = torch.where(finite, y - y.mean(0, keepdim=True), 0).float().square().sum()
            total = total.to(y.device) + torch.where(finite, z - y, 0).float().square().sum() / spread.clamp_min(1e-12)
    return total


@contextmanager
def _training(module: nn.Module, chosen: Sequence[nn.Parameter]) -> Iterator[None]:
    """Gradients for these parameters alone."""
    before = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    kept = {id(parameter) for parameter in chosen}
    try:
        for parameter, _ in before:
            parameter.requires_grad_(id(parameter) in kept)
        yield
    finally:
        for parameter, wanted in before:
            parameter.requires_grad_(wanted)
            parameter.grad = None
