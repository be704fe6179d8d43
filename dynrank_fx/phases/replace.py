"""The one place where parameters change, in the modules and in the optimizer, and the journal that undoes it."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from ..files import scratch
from ..phase import Phase
from ..rewrite import Switched
from .groups import State, place_of, put_back, swap_parameters
from .sharding import refuse_sharded


def parameters_of(module: Switched) -> tuple[Parameter, ...]:
    """The parameters that a site trains in its present phase, in the order of their names."""
    parameters = (module._parameters[name] for name in module.parameter_names)
    return tuple(p for p in parameters if p is not None)


def replace_parameters(
    modules: Sequence[Switched],
    phase: Phase,
    new: Mapping[str, Parameter],
    optimizer: Optimizer | None,
    states: Sequence[State],
    base: Tensor | None = None,
) -> None:
    """The one place where parameters change: in every module of the site, and in the optimizer.

    new: the parameters of ``phase`` by name. optimizer: the one that trains the old ones. states: its states of the new
    ones, in the same order. base: that of an ADAPTOR. Raises TransitionError for a DTensor.
    """
    old = parameters_of(modules[0])
    for parameter in old:
        refuse_sharded(modules[0].site, parameter)
    for module in modules:
        module.hold(phase, new, base)
    if optimizer is not None:
        swap_parameters(optimizer, old, list(new.values()), states, list(new))


@dataclass(frozen=True)
class _Entry:
    """What one site had before its switch, the values apart. optimizer: the one that trained it. places: (group, index,
    name) of each there.
    """

    modules: Sequence[Switched]
    optimizer: Optimizer | None
    phase: int
    rank: int
    old: list[weakref.ref[Parameter]]
    requires_grad: list[bool]
    places: list[tuple[int, int, str] | None]


class Journal:
    """What every replaced parameter, its pending gradient and its optimizer state held, in a temporary folder, until
    all sites have changed, those of averages too.

    In memory it would double the peak of a switch. Leaving the ``with`` block by an exception puts everything back:
    into the same Parameter objects where somebody still holds them, and in the same places of the optimizer's groups.
    """

    def __init__(self) -> None:
        self.entries: list[_Entry] = []
        self._scratch = scratch("dynrank-undo-")

    def __enter__(self) -> Journal:
        self.folder = self._scratch.__enter__()
        return self

    def keep(
        self,
        modules: Sequence[Switched],
        old: tuple[Parameter, ...],
        optimizer: Optimizer | None,
        gradients: Sequence[Tensor | None],
    ) -> None:
        """Note a site that is about to change. Raises OSError where the disk has no room."""
        states = [dict(optimizer.state.get(p, {})) if optimizer else {} for p in old]
        values, base = [p.detach() for p in old], modules[0]._buffers["base"]
        record = {"values": values, "gradients": list(gradients), "states": states, "base": base}
        try:
            torch.save(record, self._path(len(self.entries)))
        except RuntimeError as error:  # what torch makes of a full disk
            if "inline_container" not in str(error) and "PytorchStreamWriter" not in str(error):
                raise
            raise OSError(f"{self.folder} cannot be written to, its disk may be full") from error
        refs, grads = [weakref.ref(p) for p in old], [p.requires_grad for p in old]
        places = [place_of(optimizer, p) if optimizer else None for p in old]
        self.entries.append(_Entry(modules, optimizer, modules[0].phase, modules[0].rank, refs, grads, places))

    def _path(self, index: int) -> Path:
        return self.folder / f"{index}.pt"

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            if error is not None:
                for index, entry in reversed(list(enumerate(self.entries))):
                    self._undo(entry, torch.load(self._path(index), weights_only=True))
        finally:
            self._scratch.__exit__(None, None, None)

    def _undo(self, entry: _Entry, record: State) -> None:
        old: list[Parameter] = []
        kept = zip(entry.old, record["values"], record["gradients"], entry.requires_grad, strict=True)
        for ref, value, gradient, grad in kept:
            alive = ref()
            if alive is None:
                alive = Parameter(value, requires_grad=grad)
                alive.grad = gradient
            old.append(alive)
        for module in entry.modules:
            module.rank = entry.rank
        names = entry.modules[0].names_in(Phase(entry.phase))
        new, states = dict(zip(names, old, strict=True)), record["states"]
        replace_parameters(entry.modules, Phase(entry.phase), new, entry.optimizer, states, record["base"])
        if entry.optimizer is not None:
            put_back(entry.optimizer, old, record["states"], entry.places)
