"""Gradients at a switch: what a step has used goes with its parameter, what waits for one comes along or is refused.

A gradient is **stale** where the last step of its optimizer has used it and nothing has been added since: the order
``zero_grad(); backward(); step()`` leaves it there until the next ``zero_grad``. It is dropped. So are zeros
(``set_to_none=False``), which say nothing.

Any other is **pending**: backward ran after the last step, as in gradient accumulation. FULL to LOW or ADAPTOR it is
carried, by the chain rule through the factors (G Aᵀ and Bᵀ G), as if backward had run on them. From factors to another
phase it is not determined, since G Aᵀ and Bᵀ G do not tell G, and the switch is refused. Pending gradients of which one
is not finite are those of a step that a GradScaler has skipped or will skip: what is not determined becomes NaN, so
that a scaler still skips the step, and the next ``zero_grad`` drops it all.

What a step has used is noted by a hook on the optimizer, from the first ``enter_``, ``replan_`` or ``Phases`` on that
is given it; of steps before that nothing is known, and their gradients count as pending. Clipping and unscaling come
before a step, closures run within it: the hook sees what is left after it.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from ..layouts import Factors, Layout, at_least_float32
from ..processes import own


class StepNotes:
    """A hook after the steps of an optimizer: which gradients, at which version of theirs, the last one used."""

    def __init__(self) -> None:
        self.used: dict[int, tuple[weakref.ref[Tensor], int]] = {}

    def __call__(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        self.used = {
            id(p): (weakref.ref(p.grad), _version(p.grad))
            for group in optimizer.param_groups
            for p in group["params"]
            if p.grad is not None
        }

    def has_used(self, parameter: Parameter) -> bool:
        """Whether the last step used the very gradient that is there now."""
        gradient, (ref, version) = parameter.grad, self.used.get(id(parameter), (None, 0))
        return ref is not None and gradient is not None and ref() is gradient and version == _version(gradient)


def _version(gradient: Tensor) -> int:
    """How often it was written to; FSDP2 adds to what this process has of one."""
    return own(gradient)._version


def note_steps(optimizer: Optimizer) -> StepNotes:
    """The notes of an optimizer's steps, begun where there are none yet."""
    for hook in optimizer._optimizer_step_post_hooks.values():
        if isinstance(hook, StepNotes):
            return hook
    notes = StepNotes()
    optimizer.register_step_post_hook(notes)
    return notes


def forget_steps(optimizer: Optimizer) -> None:
    """Take the notes off the optimizer."""
    hooks = optimizer._optimizer_step_post_hooks
    for key in [key for key, hook in hooks.items() if isinstance(hook, StepNotes)]:
        del hooks[key]


def waiting_gradient(parameter: Parameter, optimizer: Optimizer | None) -> Tensor | None:
    """The gradient, zeros too, that no step has used; None where there is none."""
    gradient = parameter.grad
    if gradient is None or (optimizer is not None and note_steps(optimizer).has_used(parameter)):
        return None
    return gradient.to_dense() if gradient.is_sparse else gradient


def pending_gradient(parameter: Parameter, optimizer: Optimizer | None) -> Tensor | None:
    """The gradient that waits for a step; None where there is none, a stale one, or zeros, in this process."""
    gradient = waiting_gradient(parameter, optimizer)
    return gradient if gradient is not None and bool(own(gradient).any()) else None


def all_finite(net: nn.Module, optimizers: Sequence[Optimizer]) -> bool:
    """Whether every gradient in the net, and of what else these optimizers train, is finite in this process."""
    trained = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    gradients = [p.grad for p in (*net.parameters(), *trained) if p.grad is not None]
    return all(bool(torch.isfinite(g.coalesce().values() if g.is_sparse else own(g)).all()) for g in gradients)


def at_factors(
    layout: Layout, factors: Factors, gradients: Sequence[Tensor | None], weights: Sequence[Tensor], scale: float
) -> list[list[Tensor | None]]:
    """The gradients at a weight, or at several above one another, as those at the factors of scale · join(factors).

    Per weight those of its own factors: all, and (left,) of those that share the first one's others.
    """
    if all(gradient is None for gradient in gradients):
        return [[None] * (len(factors) if i == 0 else 1) for i in range(len(weights))]
    known = [torch.zeros_like(w) if g is None else g for g, w in zip(gradients, weights, strict=True)]
    G = at_least_float32(torch.cat(known) if len(known) > 1 else known[0])
    exact = tuple(at_least_float32(factor) for factor in factors)
    left, *others = layout.pulled_back(exact, scale * G)
    lefts = left.split([weight.shape[0] for weight in weights]) if len(weights) > 1 else [left]
    new: list[list[Tensor | None]] = [[each] for each in lefts]
    new[0] += others
    return new
