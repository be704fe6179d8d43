"""A short fine-tune of a truncated module, towards the outputs of the dense one or by a loss of one's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ..aliases import Output
from ..checks import is_list, is_whole
from ..errors import CalibrationError
from ..processes import ALONE, Processes, as_first_, check_same, in_group, whole_weights
from ..tracing import ExampleInputs, refuse_inference, same_buffers, tensors, unwrap
from .batches import call, checked_batches
from .targets import Targets

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
    group: ProcessGroup | None = None,
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
        group: The processes that fine-tune together, such as ``torch.distributed.group.WORLD``: each has the same
            module and gives its own batches, of which some may have none. A step takes one batch from each and lowers
            the mean of their losses, as DistributedDataParallel does. By default this process alone.

    Returns:
        The loss of every step, the mean over the processes.

    Raises:
        CalibrationError: For data and names that do not fit, and where the loss is not finite or has no gradient; the
            module is then as it was.
    """
    processes = in_group(group, CalibrationError)
    with processes.all_or_none(CalibrationError, "recover_"):
        root = unwrap(module)
        chosen = _chosen(root, dense, steps, loss, names)
        given = {"the argument steps": steps, "the parameters to train": [name for name, _ in chosen]}
        given |= whole_weights(processes, root, CalibrationError)
    check_same(processes, given, CalibrationError)
    as_first_(processes, root.buffers())
    data = checked_batches(batches, processes=processes)
    called = module if processes.count == 1 else root  # not by way of DDP, which would wait for the others
    return recovered_(called, dense, data, steps, loss, [parameter for _, parameter in chosen], processes)


def _chosen(
    root: nn.Module, dense: nn.Module, steps: int, loss: Loss | None, names: Sequence[str] | None
) -> list[tuple[str, nn.Parameter]]:
    """What is to be trained. Raises CalibrationError for arguments that cannot be."""
    refuse_inference(CalibrationError, "recover")
    wanted = dict(root.named_parameters())
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
    return [(name, p) for name, p in wanted.items() if name in asked and p.is_floating_point()]


def recovered_(
    module: nn.Module,
    dense: nn.Module,
    data: Sequence[ExampleInputs],
    steps: int,
    loss: Loss | None,
    chosen: Sequence[nn.Parameter],
    processes: Processes = ALONE,
) -> list[float]:
    """As ``recover_``, of arguments that were checked."""
    before = [parameter.detach().clone() for parameter in chosen]
    losses: list[float] = []
    groups = [{"params": [p], "lr": _SHARE * max(float(p.detach().square().mean().sqrt()), 1e-4)} for p in chosen]
    givers = sum(processes.gathered(bool(data)))
    targets = Targets(dense, data)
    with _training(module, chosen):
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: (1 + math.cos(math.pi * step / max(steps, 1))) / 2
        )
        try:
            for step in range(steps):
                optimizer.zero_grad()
                with processes.all_or_none(CalibrationError, "the recovery"):
                    lost = _backward(module, targets, step, loss)
                losses.append(_mean_(chosen, lost, givers, processes))
                if not math.isfinite(losses[-1]):
                    raise CalibrationError(
                        f"the loss of the recovery is {losses[-1]} at step {step}: look for a loss that overflows, "
                        "or leave the recovery out"
                    )
                optimizer.step()
                scheduler.step()
            as_first_(processes, chosen)  # machines that are not equal may round in other ways
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


def _backward(module: nn.Module, targets: Targets, step: int, loss: Loss | None) -> float:
    """The loss of one step, and its gradients; 0 and none where there are no data here."""
    if not targets.data:
        return 0.0
    with same_buffers(module):  # to the end of backward, which may need them
        lost = _lost(module, targets, step % len(targets.data), loss)
        value = float(lost.detach())
        if math.isfinite(value):
            lost.backward()
    return value


@torch.no_grad()
def _mean_(chosen: Sequence[nn.Parameter], lost: float, givers: int, processes: Processes) -> float:
    """The mean loss of the processes that have data, and the mean of the gradients in the place of each one's own."""
    if processes.count == 1:
        return lost
    total = torch.tensor(lost, dtype=torch.float64)
    reached = torch.tensor([parameter.grad is not None for parameter in chosen], dtype=torch.int32)
    for parameter in chosen:
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    gradients = [parameter.grad for parameter in chosen if parameter.grad is not None]
    processes.sum_([total, reached, *gradients])
    for parameter, count in zip(chosen, reached.tolist(), strict=True):
        parameter.grad = None if parameter.grad is None or not count else parameter.grad / givers
    return float(total) / givers


def _lost(module: nn.Module, targets: Targets, number: int, loss: Loss | None) -> Tensor:
    """The loss on one batch."""
    output = call(module, targets.data[number], number)
    if loss is None:
        return distance(output, targets.of(number))
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
