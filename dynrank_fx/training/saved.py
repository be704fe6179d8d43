"""What a folder holds to go on from, of any kind that this package has written: a checkpoint of ``save_checkpoint``,
a run of ``dynrank-fx train``, or a net that ``save`` wrote. All become one value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from .. import files, store
from ..aliases import JsonObject, StateDict
from ..errors import StoreError
from ..processes import Processes
from .run import CHECKPOINT, history_in, read_run, weights_in
from .state_tree import unflatten

STATE = "dynrank.safetensors"
"""Of a checkpoint, beside the shards: everything that is not the net's or the optimizers' own tensors."""

_NET = "weights.safetensors"


@dataclass(frozen=True)
class Saved:
    """What a folder holds.

    info: phases and ranks of the sites, and the plan. shapes: of the tensors of the net and of its averages, by names
    such as ``net.0.weight``. aliases: names of tensors that lie there under another. digests: of the shards that hold
    the tensors; where there are none, they are ``tensors``. phases: as ``Phases.state_dict`` gave it. optimizers: see
    ``named_state``. numbered: a ``state_dict`` of torch's, of one optimizer of this kind. schedulers: the learning-rate
    schedulers' states. random: each process's generators.
    """

    info: JsonObject
    shapes: Mapping[str, list[int]]
    aliases: Mapping[str, str] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    phases: StateDict | None = None
    optimizers: Sequence[StateDict] | None = None
    numbered: tuple[str, StateDict] | None = None
    schedulers: Sequence[StateDict] = ()
    random: Sequence[StateDict] = ()
    extra: StateDict = field(default_factory=dict)

    @property
    def stored(self) -> set[str]:
        """The names of the net's tensors and its averages' that lie there, each tensor once."""
        return {*self.shapes} - {*self.aliases}


def read_saved(folder: Path, processes: Processes) -> Saved:
    """What the folder holds, its shards apart: read by the first process. Raises StoreError in all."""
    kind, tensors, info = processes.from_one(0, lambda: _read(folder), StoreError, "loading")
    return {STATE: _of_checkpoint, CHECKPOINT: _of_run, _NET: _of_net}[kind](tensors, info)


def _read(folder: Path) -> tuple[str, dict[str, Tensor], JsonObject]:
    files.finish(folder)
    if not folder.is_dir():
        raise StoreError(f"there is no folder {folder}: give one that save_checkpoint wrote")
    if (folder / CHECKPOINT).exists():
        return CHECKPOINT, *read_run(folder)
    for kind in (STATE, _NET):
        if (folder / kind).exists():
            return kind, *store.read(folder / kind)
    raise StoreError(
        f"{folder} has no {STATE}: it is neither a checkpoint of save_checkpoint, nor a run of `dynrank-fx train`, nor "
        "a net that save wrote"
    )


def _of_checkpoint(tensors: dict[str, Tensor], info: JsonObject) -> Saved:
    state = unflatten(info["state"], tensors)
    return Saved(info, info["shapes"], info["aliases"], info["digests"], **state)


def _of_net(tensors: dict[str, Tensor], info: JsonObject) -> Saved:
    return Saved(info, _shapes(tensors), tensors=_named(tensors))


def _of_run(tensors: dict[str, Tensor], info: JsonObject) -> Saved:
    """Of a run, whose loop is the command's: where it stood within an epoch is not a thing of a loop of one's own."""
    weights, state = weights_in(tensors), unflatten(info["state"], tensors)
    scaler = state.get("scaler")  # of float16
    records = [record.to_json() for record in history_in(info)]
    records += [info["record"]] if info["record"] else []
    return Saved(
        info,
        _shapes(weights),
        tensors=_named(weights),
        phases={"history": records, "rates": [], **state["hooks"]},
        numbered=(info["made_of"]["optimizer"], state["optimizer"]),
        schedulers=[state["lr_scheduler"]] if state["lr_scheduler"] is not None else [],
        random=[state["random"]],
        extra={"epoch": info["epoch"], "step": info["step"]} | ({"scaler": scaler} if scaler else {}),
    )


def _named(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"net.{name}": tensor for name, tensor in weights.items()}


def _shapes(weights: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {f"net.{name}": list(tensor.shape) for name, tensor in weights.items()}
