"""An optimizer's parameter groups and state, when one parameter takes the place of others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from ..aliases import Group
from ..checks import is_list
from ..errors import TransitionError

State: TypeAlias = dict[str, Any]
"""What an optimizer keeps of a parameter: tensors and numbers, under names of its own."""

Optimizers: TypeAlias = Optimizer | Sequence[Optimizer]
"""One optimizer, or several that share the parameters of a net among them."""


def optimizers_in(given: Optimizers | None) -> tuple[Optimizer, ...]:
    """torch's own optimizers in what a caller gave: Accelerate's and Lightning's wrappers hold one as ``optimizer``.

    Raises TransitionError for what is none.
    """
    several = () if given is None else given if isinstance(given, Sequence) and is_list(given) else (given,)
    inner = [(each, getattr(each, "optimizer", None)) for each in several]
    found = tuple(own if isinstance(own, Optimizer) else each for each, own in inner)
    for each in found:
        if not isinstance(each, Optimizer):
            raise TransitionError(f"{each!r} is no optimizer: give one of torch.optim, or several in a list")
    return found


def holder_of(optimizers: Sequence[Optimizer], parameters: Sequence[Parameter]) -> Optimizer | None:
    """The optimizer that trains the first of these parameters that any of them trains, or None."""
    for parameter in parameters:
        for optimizer in optimizers:
            if place_of(optimizer, parameter) is not None:
                return optimizer
    return None


def group_of(optimizer: Optimizer, parameter: Parameter) -> Group | None:
    """The parameter group that trains this parameter, or None."""
    place = place_of(optimizer, parameter)
    return None if place is None else optimizer.param_groups[place[0]]


def swap_parameters(
    optimizer: Optimizer,
    old: Sequence[Parameter],
    new: Sequence[Parameter],
    states: Sequence[State],
    names: Sequence[str],
) -> None:
    """Put ``new`` where ``old`` stood in the parameter groups, with these states; nothing of ``old`` remains.

    Each new parameter goes into the group of the one it replaces (several into one's place; one into the first's
    place). names: the last part of the new parameters' names, for groups that keep ``param_names``. Parameters that
    the optimizer does not train are left out of it.
    """
    places = [place for place in (place_of(optimizer, o) for o in old) if place is not None]
    if not places:
        return
    g, index, name = min(places)
    group, prefix = optimizer.param_groups[g], name.rpartition(".")[0]
    _take_out(optimizer, old)
    group["params"][index:index] = list(new)
    if "param_names" in group:
        group["param_names"][index:index] = [f"{prefix}.{name}".lstrip(".") for name in names]
    for p, state in zip(new, states, strict=True):
        if state:
            optimizer.state[p] = laid_out_as(p, state)


def laid_out_as(parameter: Parameter, state: State) -> State:
    """The state with every tensor of the parameter's shape in its memory format too, as fused optimizers expect."""

    def like(value: object) -> object:
        if not isinstance(value, Tensor) or value.shape != parameter.shape or value.stride() == parameter.stride():
            return value
        return torch.empty_like(parameter, dtype=value.dtype, device=value.device).copy_(value)

    return {key: like(value) for key, value in state.items()}


def place_of(optimizer: Optimizer, parameter: Parameter) -> tuple[int, int, str] | None:
    """Where a parameter stands in the optimizer: (group, index, name), or None."""
    for g, group in enumerate(optimizer.param_groups):
        for i, p in enumerate(group["params"]):
            if p is parameter:
                return g, i, group["param_names"][i] if "param_names" in group else ""
    return None


def put_back(
    optimizer: Optimizer,
    parameters: Sequence[Parameter],
    states: Sequence[State],
    places: Sequence[tuple[int, int, str] | None],
) -> None:
    """Parameters at the places that ``place_of`` gave before a switch, wherever they are now, with their states."""
    _take_out(optimizer, parameters)
    rows = [row for row in zip(places, parameters, states, strict=True) if row[0] is not None]
    for (g, i, name), parameter, state in sorted(rows, key=lambda row: row[0][:2]):  # type: ignore[misc,index]
        group = optimizer.param_groups[g]
        group["params"].insert(i, parameter)
        if "param_names" in group:
            group["param_names"].insert(i, name)
        if state:
            optimizer.state[parameter] = state


def _take_out(optimizer: Optimizer, parameters: Sequence[Parameter]) -> None:
    """Leave no trace of these parameters in the optimizer."""
    for group in optimizer.param_groups:
        stays = [all(p is not o for o in parameters) for p in group["params"]]
        for key in ("params", "param_names"):
            if key in group:
                group[key][:] = [x for x, keep in zip(group[key], stays, strict=True) if keep]
    for parameter in parameters:
        optimizer.state.pop(parameter, None)
