"""The one place where parameters change, in the modules and in the optimizer, and the journal that undoes it."""

from __future__ import annotations

import itertools
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from . import optim
from .errors import TransitionError
from .optim import State
from .phase import Phase
from .switched import Switched


def parameters_of(module: Switched) -> tuple[Parameter, ...]:
    found = (module._parameters[name] for name in module.parameter_names)
    return tuple(p for p in found if p is not None)  # type: ignore[misc]


def refuse_parameter(name: str, parameter: Parameter) -> None:
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
) -> None:
    """The one place where parameters change: in every module of the site, and in the optimizer.

    new: the parameters of ``phase`` by name. states: their optimizer states, in the same order. Raises
    TransitionError for a DTensor or a pending gradient.
    """
    old = parameters_of(modules[0])
    for parameter in old:
        refuse_parameter(modules[0].site, parameter)
    for module in modules:
        for name in ("weight", *module.layout.factor_names):
            module._parameters[name] = new.get(name)
        module.phase = int(phase)
    if optimizer is not None:
        optim.swap_parameters(optimizer, old, list(new.values()), states, list(new))


class Journal:
    """What every replaced parameter and its optimizer state held, in a temporary folder, until all sites have changed.

    In memory it would double the peak of a switch. Leaving the ``with`` block by an exception puts everything back:
    into the same Parameter objects where somebody still holds them, with the optimizer's groups as they were.
    """

    def __init__(self, optimizer: Optimizer | None) -> None:
        self.optimizer = optimizer
        self.entries: list[tuple[list[Switched], int, list[weakref.ref[Parameter]], list[bool]]] = []
        self.file = tempfile.TemporaryDirectory(prefix="dynrank-", ignore_cleanup_errors=True)
        if optimizer is not None:
            # Weak, or the groups' copies would keep every old parameter alive.
            self.groups = [[weakref.ref(p) for p in group["params"]] for group in optimizer.param_groups]
            self.names = [list(group.get("param_names", ())) for group in optimizer.param_groups]

    def __enter__(self) -> Journal:
        return self

    def keep(self, modules: list[Switched], old: tuple[Parameter, ...], new: tuple[Parameter, ...]) -> None:
        states = [dict(self.optimizer.state.get(p, {})) if self.optimizer else {} for p in old]
        record = {"values": [p.detach() for p in old], "states": states}
        torch.save(record, self._path(len(self.entries)))
        self.entries.append((modules, modules[0].phase, [weakref.ref(p) for p in old], [p.requires_grad for p in old]))

    def _path(self, index: int) -> Path:
        return Path(self.file.name) / f"{index}.pt"

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            if error is not None:
                self._undo()
        finally:
            self.file.cleanup()

    def _undo(self) -> None:
        restored: dict[weakref.ref[Parameter], Parameter] = {}
        for index, (modules, phase, refs, grads) in reversed(list(enumerate(self.entries))):
            device = parameters_of(modules[0])[0].device
            record = torch.load(self._path(index), map_location=device, weights_only=True)
            old: dict[str, Parameter] = {}
            fields = ("weight",) if phase == int(Phase.FULL) else modules[0].layout.factor_names
            for name, ref, value, grad in zip(fields, refs, record["values"], grads, strict=True):
                alive = ref()
                old[name] = Parameter(value, requires_grad=grad) if alive is None else alive
                restored[ref] = old[name]
            replace_parameters(modules, Phase(phase), old, self.optimizer, record["states"])
        if self.optimizer is not None:
            current = {id(p): p for p in itertools.chain(*(g["params"] for g in self.optimizer.param_groups))}
            for group, refs, names in zip(self.optimizer.param_groups, self.groups, self.names, strict=True):
                found = [restored.get(ref) or ref() for ref in refs]
                group["params"][:] = [p for p in found if p is not None and id(p) in current]
                if "param_names" in group:
                    group["param_names"][:] = names
