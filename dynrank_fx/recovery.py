"""After a truncation: batch norms that fit what now comes in, and a short fine-tune of its parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .batches import call, checked_batches
from .errors import CalibrationError
from .onnxcheck import tensors
from .scopes import same_buffers

Loss = Callable[[Any, int], Tensor]
"""(output, number of the calibration batch it is of) to the loss."""

_TRAINING, _MOMENTUM = 5, 6  # the places of these arguments in aten.batch_norm
_SHARE = 0.01  # of the root mean square of a parameter: the largest step of one of its numbers


@torch.no_grad()
def recalibrate_(module: nn.Module, batches: Iterable[Any]) -> int:
    """Give the batch norms of a truncated module the means and variances that its inputs now have over the batches.

    Their statistics were those of the dense model's outputs, of which a cut takes some variance away. Everything else
    stays in evaluation mode. Returns how many batch norms there are. Raises CalibrationError as ``calibrate`` does.
    """
    data = checked_batches(batches)
    norms = [part for part in module.modules() if isinstance(part, _BatchNorm) and part.track_running_stats]
    nodes = [(part, node) for part in module.modules() if isinstance(part, fx.GraphModule) for node in _norms_of(part)]
    if not norms and not nodes:
        return 0
    momenta = [norm.momentum for norm in norms]
    modes = [norm.training for norm in norms]
    arguments = [node.args for _, node in nodes]
    try:
        for norm in norms:
            norm.train()
        for number, batch in enumerate(data):
            for norm in norms:
                norm.momentum = 1 / (number + 1)  # the mean of what each batch has
            for _, node in nodes:
                node.args = (*node.args[:_TRAINING], True, 1 / (number + 1), *node.args[_MOMENTUM + 1 :])
            for part in {id(part): part for part, _ in nodes}.values():
                part.recompile()
            call(module, batch, number)
    finally:
        for norm, momentum, mode in zip(norms, momenta, modes, strict=True):
            norm.momentum = momentum
            norm.train(mode)
        for (part, node), args in zip(nodes, arguments, strict=True):
            node.args = args
            part.recompile()
    return len(norms) + len(nodes)


def recover_(
    module: nn.Module,
    dense: nn.Module,
    batches: Iterable[Any],
    steps: int,
    *,
    loss: Loss | None = None,
    names: Sequence[str] | None = None,
) -> list[float]:
    """Fine-tune a truncated module for so many steps, in evaluation mode (dropout off, batch norms as they are).

    loss: by default the distance to the dense model's outputs, Σ ‖z − y‖² / ‖y − ȳ‖² over its floating-point outputs
    (ȳ the mean over the batch). names: of the parameters to train; by default all. The largest change of a parameter in
    a step is a hundredth of its root mean square (Adam), falling to zero along a cosine. Returns the loss of every
    step. Raises CalibrationError for data that do not fit, and where the loss is not finite; the module is then as it
    was.
    """
    data = checked_batches(batches)
    wanted = dict(module.named_parameters())
    chosen = [wanted[name] for name in (wanted if names is None else names)]
    chosen = [parameter for parameter in chosen if parameter.is_floating_point()]
    before = [parameter.detach().clone() for parameter in chosen]
    losses: list[float] = []
    groups = [{"params": [p], "lr": _SHARE * max(float(p.detach().square().mean().sqrt()), 1e-4)} for p in chosen]
    with _training(module, chosen), same_buffers(module):
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2
        )
        for step in range(steps):
            number = step % len(data)
            output = call(module, data[number], number)
            if loss is None:
                with torch.no_grad():
                    target = call(dense, data[number], number)
                found = distance(output, target)
            else:
                found = loss(output, number)
            losses.append(float(found.detach()))
            if not math.isfinite(losses[-1]):
                with torch.no_grad():
                    for parameter, value in zip(chosen, before, strict=True):
                        parameter.copy_(value)
                raise CalibrationError(
                    f"the loss of the recovery is {losses[-1]} at step {step}: look for a loss that overflows, or "
                    "leave the recovery out"
                )
            optimizer.zero_grad()
            found.backward()
            optimizer.step()
            scheduler.step()
    return losses


def distance(output: Any, target: Any) -> Tensor:
    """How far outputs are from those wanted, in parts of what those vary by over the batch."""
    total = torch.zeros(())
    for z, y in zip(tensors(output), tensors(target), strict=True):
        if y.is_floating_point():
            finite = y.isfinite()
            spread = torch.where(finite, y - y.mean(0, keepdim=True), 0).float().square().sum()
            total = total.to(y.device) + torch.where(finite, z - y, 0).float().square().sum() / spread.clamp_min(1e-12)
    return total


def _norms_of(module: fx.GraphModule) -> list[fx.Node]:
    """The batch norms of a graph by torch.export, which are functions of their statistics."""
    return [
        node
        for node in module.graph.nodes
        if node.target is torch.ops.aten.batch_norm.default and node.args[3] is not None and len(node.args) > _MOMENTUM
    ]


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
