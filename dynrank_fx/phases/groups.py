"""An optimizer's parameter groups and state, when one parameter takes the place of others."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

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


Place: TypeAlias = tuple[int, int, str]
"""Where a parameter stands in an optimizer: the group, the slot, and its name, if the group keeps names."""

_LISTS = {"params", "param_names"}
_SLOTS: WeakKeyDictionary[Optimizer, dict[int, tuple[int, int]]] = WeakKeyDictionary()
"""Of each optimizer whose groups are in slots: the group and slot of every parameter, by its id."""


def optimizers_in(given: Optimizers | None) -> tuple[Optimizer, ...]:
    """torch's own optimizers in what a caller gave: Accelerate's and Lightning's wrappers hold one as ``optimizer``.

    Raises TransitionError for what is none.
    """
    several: Collection[object] = () if given is None else given if is_list(given) else (given,)
    inner = [(each, getattr(each, "optimizer", None)) for each in several]
    found = []
    for each, own in inner:
        optimizer = own if isinstance(own, Optimizer) else each
        if not isinstance(optimizer, Optimizer):
            raise TransitionError(f"{each!r} is no optimizer: give one of torch.optim, or several in a list")
        found.append(optimizer)
    return tuple(found)


def holders_of(optimizers: Iterable[Optimizer]) -> dict[int, Optimizer]:
    """The optimizer that trains each parameter, by the parameter's id; the first of several."""
    holders: dict[int, Optimizer] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                holders.setdefault(id(parameter), optimizer)
    return holders


def holder_in(holders: Mapping[int, Optimizer], parameters: Sequence[Parameter]) -> Optimizer | None:
    """The optimizer that trains the first of these parameters that any trains, or None."""
    return next((holders[id(p)] for p in parameters if id(p) in holders), None)


def group_of(optimizer: Optimizer, parameter: Parameter) -> Group | None:
    """The parameter group that trains this parameter, or None; the groups are in slots."""
    place = _SLOTS[optimizer].get(id(parameter))
    return None if place is None else optimizer.param_groups[place[0]]


@contextmanager
def in_slots(optimizers: Iterable[Optimizer]) -> Iterator[None]:
    """Within it parameters of these optimizers can be exchanged.

    Each place of a group is then a slot, a list of the parameters that stand there: no place moves, and one of many
    thousand parameters is found at once. Afterwards the groups are lists of parameters as before.
    """
    opened = list(dict.fromkeys(optimizers))
    try:
        for optimizer in opened:
            places = {}
            for g, group in enumerate(optimizer.param_groups):
                for i, parameter in enumerate(group["params"]):
                    places[id(parameter)] = g, i
                for key in _LISTS & group.keys():
                    group[key][:] = [[value] for value in group[key]]
            _SLOTS[optimizer] = places
        yield
    finally:
        for optimizer in opened:
            if _SLOTS.pop(optimizer, None) is not None:
                for group in optimizer.param_groups:
                    for key in _LISTS & group.keys():
                        group[key][:] = [value for slot in group[key] for value in slot]


def stand_in(optimizer: Optimizer, parameter: Parameter, other: Parameter, state: State) -> None:
    """Let another parameter be read, with this state, as if it stood in the place of one of these, until
    ``stand_back``; the groups are in slots, and stay as they are.
    """
    place = _SLOTS[optimizer].get(id(parameter))
    if place is not None:
        _SLOTS[optimizer][id(other)] = place
        optimizer.state[other] = state


def stand_back(optimizer: Optimizer, other: Parameter) -> None:
    """Forget a parameter that stood in the place of one."""
    _SLOTS[optimizer].pop(id(other), None)
    optimizer.state.pop(other, None)


def swap_parameters(
    optimizer: Optimizer,
    old: Sequence[Parameter],
    new: Sequence[Parameter],
    states: Sequence[State],
    names: Sequence[str],
) -> None:
    """Put ``new`` where ``old`` stood in the parameter groups, with these states; nothing of ``old`` remains.

    Each new parameter goes into the slot of the one it replaces (several into one's; one into the first's). names: the
    last part of the new parameters' names, for groups that keep ``param_names``. Parameters that the optimizer does not
    train are left out of it.
    """
    places = [place for place in (place_of(optimizer, o) for o in old) if place is not None]
    if not places:
        return
    g, i, name = min(places)
    prefix = name.rpartition(".")[0]
    _take_out(optimizer, old)
    for parameter, own, state in zip(new, names, states, strict=True):
        _add(optimizer, (g, i, f"{prefix}.{own}".lstrip(".")), parameter, laid_out_as(parameter, state))


def laid_out_as(parameter: Parameter, state: State) -> State:
    """The state with every tensor of the parameter's shape in its memory format too, as fused optimizers expect."""

    def like(value: object) -> object:
        if not isinstance(value, Tensor) or value.shape != parameter.shape or value.stride() == parameter.stride():
            return value
        return torch.empty_like(parameter, dtype=value.dtype, device=value.device).copy_(value)

    return {key: like(value) for key, value in state.items()}


def place_of(optimizer: Optimizer, parameter: Parameter) -> Place | None:
    """Where a parameter stands in the optimizer, whose groups are in slots: (group, slot, name), or None."""
    place = _SLOTS[optimizer].get(id(parameter))
    if place is None:
        return None
    g, i = place
    group = optimizer.param_groups[g]
    at = [id(p) for p in group["params"][i]].index(id(parameter))
    return g, i, group["param_names"][i][at] if "param_names" in group else ""


def put_back(
    optimizer: Optimizer,
    parameters: Sequence[Parameter],
    states: Sequence[State],
    places: Sequence[Place | None],
) -> None:
    """Parameters into the slots that ``place_of`` gave before a switch, wherever they are now, with their states."""
    _take_out(optimizer, parameters)
    for parameter, state, place in zip(parameters, states, places, strict=True):
        if place is not None:
            _add(optimizer, place, parameter, state)


def _add(optimizer: Optimizer, place: Place, parameter: Parameter, state: State) -> None:
    """A parameter behind those that stand in a slot."""
    g, i, name = place
    group = optimizer.param_groups[g]
    group["params"][i].append(parameter)
    if "param_names" in group:
        group["param_names"][i].append(name)
    _SLOTS[optimizer][id(parameter)] = g, i
    if state:
        optimizer.state[parameter] = state


def _take_out(optimizer: Optimizer, parameters: Sequence[Parameter]) -> None:
    """Leave no trace of these parameters in the optimizer."""
    for parameter in parameters:
        place = _SLOTS[optimizer].pop(id(parameter), None)
        if place is not None:
            g, i = place
            group = optimizer.param_groups[g]
            at = [id(p) for p in group["params"][i]].index(id(parameter))
            for key in _LISTS & group.keys():
                del group[key][i][at]
        optimizer.state.pop(parameter, None)
