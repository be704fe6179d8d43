"""The one place where parameters change, in the modules and in the optimizer, and the journal that undoes it."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from ..files import scratch
from ..phase import Phase
from ..processes import Outline, Shards, own
from ..rewrite import Switched
from .groups import State, place_of, put_back, swap_parameters


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
    shards: Shards | None = None,
) -> None:
    """The one place where parameters change: in every module of the site, in what FSDP2 holds of them, and in the
    optimizer.

    new: the parameters of ``phase`` by name. optimizer: the one that trains the old ones. states: its states of the new
    ones, in the same order. base: that of an ADAPTOR. shards: where the net is sharded; the new ones are parts then.
    """
    old = parameters_of(modules[0])
    for module in modules:
        module.hold(phase, new, base)
    if shards:
        shards.replace(modules, ("weight", *modules[0].layout.factor_names), new)
    if optimizer is not None:
        swap_parameters(optimizer, old, list(new.values()), states, list(new))


@dataclass(frozen=True)
class _Entry:
    """What one site had before its switch, the values apart. optimizer: the one that trained it. places: (group, index,
    name) of each there. outlines: of what was in parts, in the order of the record's leaves.
    """

    modules: Sequence[Switched]
    optimizer: Optimizer | None
    phase: int
    rank: int
    old: list[weakref.ref[Parameter]]
    requires_grad: list[bool]
    places: list[tuple[int, int, str] | None]
    outlines: list[Outline | None] = field(default_factory=list)


class Journal:
    """What every replaced parameter, its pending gradient and its optimizer state held, in a temporary folder, until
    all sites have changed, those of averages too.

    In memory it would double the peak of a switch. Leaving the ``with`` block by an exception puts everything back:
    into the same Parameter objects where somebody still holds them, and in the same places of the optimizer's groups.
    Of what several processes hold in parts each keeps its own.

    Args:
        shards: Where the net, or an average of it, is sharded.
    """

    def __init__(self, shards: Shards) -> None:
        self.entries: list[_Entry] = []
        self.shards = shards
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
        leaves, spec = pytree.tree_flatten(record)
        outlines = [Outline.of(leaf) if isinstance(leaf, Tensor) else None for leaf in leaves]
        parts = [own(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        try:
            torch.save(pytree.tree_unflatten(parts, spec), self._path(len(self.entries)))
        except RuntimeError as error:  # what torch makes of a full disk
            if "inline_container" not in str(error) and "PytorchStreamWriter" not in str(error):
                raise
            raise OSError(f"{self.folder} cannot be written to, its disk may be full") from error
        refs, grads = [weakref.ref(p) for p in old], [p.requires_grad for p in old]
        places = [place_of(optimizer, p) if optimizer else None for p in old]
        module = modules[0]
        self.entries.append(_Entry(modules, optimizer, module.phase, module.rank, refs, grads, places, outlines))

    def _path(self, index: int) -> Path:
        return self.folder / f"{index}.pt"

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            if error is not None:
                for index, entry in reversed(list(enumerate(self.entries))):
                    self._undo(entry, self._record(index, entry))
        finally:
            self._scratch.__exit__(None, None, None)

    def _record(self, index: int, entry: _Entry) -> State:
        leaves, spec = pytree.tree_flatten(torch.load(self._path(index), weights_only=True))
        parts = [
            leaf if outline is None else outline.around(leaf)
            for leaf, outline in zip(leaves, entry.outlines, strict=True)
        ]
        record: State = pytree.tree_unflatten(parts, spec)
        return record

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
        new, states, base = dict(zip(names, old, strict=True)), record["states"], record["base"]
        replace_parameters(entry.modules, Phase(entry.phase), new, entry.optimizer, states, base, self.shards)
        if entry.optimizer is not None:
            put_back(entry.optimizer, old, record["states"], entry.places)
