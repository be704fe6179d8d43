"""The one place where parameters change, in the modules and in the optimizer, and the journal that undoes it."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from ..errors import TransitionError
from ..phase import Phase
from ..rewrite import Switched
from .groups import State, place_of, put_back, swap_parameters


def parameters_of(module: Switched) -> tuple[Parameter, ...]:
    """The parameters that a site trains in its present phase, in the order of their names."""
    parameters = (module._parameters[name] for name in module.parameter_names)
    return tuple(p for p in parameters if p is not None)


def refuse_parameter(name: str, parameter: Parameter) -> None:
    """Raise TransitionError for a parameter that is sharded or has a pending gradient."""
    if isinstance(parameter, torch.distributed.tensor.DTensor) if torch.distributed.is_available() else False:
        raise TransitionError(f"{name} is a DTensor, sharded over devices: gather it, switch, and shard it again")
    if parameter.grad is not None:
        raise TransitionError(
            f"{name} has a pending gradient, which the switch would lose: step the optimizer, then "
            f"optimizer.zero_grad()"
        )


def replace_parameters(
    modules: Sequence[Switched],
    phase: Phase,
    new: Mapping[str, Parameter],
    optimizer: Optimizer | None,
    states: Sequence[State],
    base: Tensor | None = None,
) -> None:
    """The one place where parameters change: in every module of the site, and in the optimizer.

    new: the parameters of ``phase`` by name. states: their optimizer states, in the same order. base: that of an
    ADAPTOR. Raises TransitionError for a DTensor or a pending gradient.
    """
    old = parameters_of(modules[0])
    for parameter in old:
        refuse_parameter(modules[0].site, parameter)
    for module in modules:
        for name in ("weight", *module.layout.factor_names):
            module._parameters[name] = new.get(name)
        module._buffers["base"] = base
        module.phase = int(phase)
    if optimizer is not None:
        swap_parameters(optimizer, old, list(new.values()), states, list(new))


@dataclass(frozen=True)
class _Entry:
    """What one site had before its switch, the values apart. places: (group, index, name) of each in the optimizer."""

    modules: Sequence[Switched]
    phase: int
    rank: int
    old: list[weakref.ref[Parameter]]
    requires_grad: list[bool]
    places: list[tuple[int, int, str] | None]


class Journal:
    """What every replaced parameter and its optimizer state held, in a temporary folder, until all sites have changed.

    In memory it would double the peak of a switch. Leaving the ``with`` block by an exception puts everything back:
    into the same Parameter objects where somebody still holds them, and in the same places of the optimizer's groups.
    """

    def __init__(self, optimizer: Optimizer | None) -> None:
        self.optimizer = optimizer
        self.entries: list[_Entry] = []
        self.folder = tempfile.TemporaryDirectory(prefix="dynrank-", ignore_cleanup_errors=True)

    def __enter__(self) -> Journal:
        return self

    def keep(self, modules: Sequence[Switched], old: tuple[Parameter, ...]) -> None:
        """Note a site that is about to change. Raises OSError where the disk has no room."""
        states = [dict(self.optimizer.state.get(p, {})) if self.optimizer else {} for p in old]
        record = {"values": [p.detach() for p in old], "states": states, "base": modules[0]._buffers["base"]}
        try:
            torch.save(record, self._path(len(self.entries)))
        except RuntimeError as error:  # what torch makes of a full disk
            if "inline_container" not in str(error) and "PytorchStreamWriter" not in str(error):
                raise
            raise OSError(f"{self.folder.name} cannot be written to, its disk may be full") from error
        refs, grads = [weakref.ref(p) for p in old], [p.requires_grad for p in old]
        places = [place_of(self.optimizer, p) if self.optimizer else None for p in old]
        self.entries.append(_Entry(modules, modules[0].phase, modules[0].rank, refs, grads, places))

    def _path(self, index: int) -> Path:
        return Path(self.folder.name) / f"{index}.pt"

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            if error is not None:
                for index, entry in reversed(list(enumerate(self.entries))):
                    self._undo(entry, torch.load(self._path(index), weights_only=True))
        finally:
            self.folder.cleanup()

    def _undo(self, entry: _Entry, record: State) -> None:
        old: list[Parameter] = []
        for ref, value, grad in zip(entry.old, record["values"], entry.requires_grad, strict=True):
            alive = ref()
            old.append(Parameter(value, requires_grad=grad) if alive is None else alive)
        for module in entry.modules:
            module.rank = entry.rank
        names = entry.modules[0].names_in(Phase(entry.phase))
        new, states = dict(zip(names, old, strict=True)), record["states"]
        replace_parameters(entry.modules, Phase(entry.phase), new, self.optimizer, states, record["base"])
        if self.optimizer is not None:
            put_back(self.optimizer, old, record["states"], entry.places)
