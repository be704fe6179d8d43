"""Checkpoints of a loop of one's own, by one process or several: everything that training goes on from, in one folder.

The tensors of net and optimizers lie there in shards, see ``shard_files``: whatever number of processes wrote
them, and however the net was wrapped or sharded then, any other goes on. The rest is one small file, which is written
last. A folder takes the place of the one before it when all of it is on the disk, in every process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim.lr_scheduler import LRScheduler
from torch.utils import _pytree as pytree

from .. import files, store
from ..aliases import JsonObject, StateDict
from ..checks import checked_path
from ..errors import StoreError
from ..layouts import Factors, Layout
from ..phase import Phase
from ..phases import Carry, Optimizers, enter_, info_of, not_finite, replan_, warn_of
from ..processes import Processes, ignored_by, is_part, own, processes_training, started, whole, wrappers_of
from ..randomness import random_state, set_random_state
from ..rewrite import plan_of, switched_modules
from ..tracing import load_state_, note, unwrap
from .fits import check_fit
from .optimizer_state import named_of_numbered, named_state, restore_state_
from .parts import Parts, of_all, parts_of, stored_in, tensors_of
from .phases import Phases
from .resume import RESUMED
from .saved import STATE, Saved, read_saved
from .state_tree import flatten


@dataclass(frozen=True)
class Loaded:
    """What a checkpoint held beside what has been brought to it.

    Attributes:
        phases: The state of the phases, for ``Phases(..., resume=)`` where none was given; None where the checkpoint
            was written without.
        extra: What ``save_checkpoint`` was given as ``extra``; of a run of ``dynrank-fx train`` its epoch and step, and
            the state of its ``scaler``, where it has one.
    """

    phases: StateDict | None
    extra: StateDict

    def __repr__(self) -> str:
        phases = None if self.phases is None else f"<state after {len(self.phases['history'])} records>"
        return f"Loaded(phases={phases}, extra=<{', '.join(map(str, self.extra)) or 'nothing'}>)"


def save_checkpoint(
    folder: str | Path,
    net: nn.Module,
    optimizer: Optimizers | None = None,
    *,
    phases: Phases | None = None,
    lr_scheduler: LRScheduler | Sequence[LRScheduler] | None = None,
    extra: Mapping[str, Any] | None = None,  # Any: values of the user's own
) -> None:
    """Write everything that training goes on from, between any two steps.

    All processes call it, with one folder on a disk that all of them see. It appears whole or not at all: an
    interruption at any moment leaves the one that was there. The random generators of Python, NumPy and torch are in
    it, those of each process. Buffers are those of the first.

    Args:
        folder: Where to write; a checkpoint that is there is replaced.
        net: What ``transform`` made, as it is trained: bare, compiled, in ``DistributedDataParallel``, or sharded by
            ``fully_shard``.
        optimizer: The optimizer over its parameters, or all of them; by default those of ``phases``.
        phases: The ``Phases`` at work.
        lr_scheduler: The learning-rate scheduler, or all of them; by default that of ``phases``.
        extra: What else your loop goes on from, such as the epoch, or the state of a data loader or a ``GradScaler``:
            plain values and tensors, as ``state_dict()`` gives them. That of the first process is kept.

    Raises:
        PlanError: For a module without a plan.
        StoreError: Where the disk refuses in any process, the folder holds other files, or something cannot be kept.
            What was there is unchanged then.
        TransitionError: For what is no optimizer.

    Warns:
        DynrankWarning: Where weights, buffers, the optimizer's state or the learning rate are not finite; without
            ``phases``, buffers are those of batch norms alone, since others may be meant so.
    """
    if not isinstance(extra, Mapping | None):
        raise StoreError(f"extra is {extra!r}: give a dict of plain values and tensors, or leave it out")
    processes, folder = _processes(net), checked_path(folder)
    with processes.all_or_none(StoreError, "saving"):
        parts = parts_of(net, optimizer, phases, lr_scheduler)
        tensors, shapes, aliases = stored_in(parts.modules)
        told, moments = named_state(parts.optimizers, parts.names)
        if not processes.first:
            tensors, moments = of_all(tensors, moments, {parts.names[each] for each in ignored_by(wrappers_of(net))})
        info = {"shapes": shapes, "aliases": aliases, **info_of(parts.root)}
    if phases is None:  # which warn themselves
        warn_of(not_finite(parts.root, parts.optimizers))
    state = {
        "phases": phases.state_dict() if phases is not None else None,
        "optimizers": told if optimizer is not None or phases is not None else None,
        "schedulers": [each.state_dict() for each in parts.schedulers],
        "extra": dict(extra or {}),
    }
    _write(folder, processes, tensors | moments, info, _whole(state))


def _write(
    folder: Path, processes: Processes, tensors: Mapping[str, Tensor], info: JsonObject, state: StateDict
) -> None:
    """All processes write their shards, then the first one the rest, and it brings the folder into its place."""
    from .shard_files import names_of_shards, write_shards  # with parts of torch that take a while to import

    ours = frozenset({STATE, *names_of_shards(folder)})
    with ExitStack() as stack:
        with processes.all_or_none(StoreError, "saving"):
            new = stack.enter_context(files.replacing_folder(folder, ours)) if processes.first else folder
        new = Path(processes.from_one(0, lambda: str(new), StoreError, "saving"))
        with processes.all_or_none(StoreError, "saving"):
            if not new.is_dir():
                raise StoreError(f"there is no folder {new} here: give one on a disk that all processes see")
        digests = write_shards(new, tensors, processes)
        random = processes.gathered(random_state())
        with processes.all_or_none(StoreError, "saving"):
            if processes.first:
                tree, small = flatten(state | {"random": random}, "state")
                store.write(new / STATE, small, info | {"digests": digests, "state": tree}, final=folder / STATE)
                stack.close()


def load_checkpoint_(
    folder: str | Path,
    net: nn.Module,
    optimizer: Optimizers | None = None,
    *,
    phases: Phases | None = None,
    lr_scheduler: LRScheduler | Sequence[LRScheduler] | None = None,
) -> Loaded:
    """Bring a net, and what trains it, to where a checkpoint stands, in place.

    The net enters the phases and ranks of the checkpoint, the optimizer with it, and all get the values that were
    saved. All processes that train the net call it. The checkpoint may be of another number of processes, and of a net
    that was wrapped or sharded in another way. The random generators go on too where the number is the same. A run of
    ``dynrank-fx train`` loads as well, and so does a net that ``save`` wrote.

    Args:
        folder: What ``save_checkpoint`` wrote.
        net: The net by the same plan, in any phase: bare, compiled, wrapped or sharded.
        optimizer: The optimizer over its parameters, or all of them, made as they were made then; by default those of
            ``phases``. Without any, only the net is loaded.
        phases: The ``Phases`` of the run, where they are made already.
        lr_scheduler: The learning-rate scheduler, or all of them; by default that of ``phases``.

    Returns:
        The state of the phases, for ``Phases`` that are made afterwards, and what was ``extra``.

    Raises:
        PlanError: For a module without a plan.
        StoreError: For a folder that holds none, for a file that is damaged or of another checkpoint, and where it is
            of another model, plan or optimizer. Net and optimizer are unchanged then.
        TransitionError: As ``enter_`` does.
    """
    from .shard_files import check_shards, copy_whole_, read_shards_

    processes, folder = _processes(net), checked_path(folder)
    saved = read_saved(folder, processes)
    if saved.digests:
        check_shards(folder, saved.digests, processes)
    with processes.all_or_none(StoreError, "loading"):
        parts = parts_of(net, optimizer, phases, lr_scheduler)
        check_fit(saved, parts, phases)
    _enter_saved(net, parts, saved.info)
    loaded = {name: tensor for name, tensor in tensors_of(parts.modules) if name in saved.stored}
    with processes.all_or_none(StoreError, "loading"):
        told, whole = _told(saved, parts)
        moments = restore_state_(parts.optimizers, told, parts.names)
    if saved.digests:
        read_shards_(folder, loaded | moments, processes)
    for name, tensor in {} if saved.digests else (loaded | moments).items():
        copy_whole_(tensor, whole[name])
    _take_(parts.modules, loaded, saved.aliases)
    _go_on(saved, parts, phases, processes)
    return Loaded(saved.phases, saved.extra)


def _processes(net: nn.Module) -> Processes:
    """Those that train the net. One that nothing wraps is its own process's, unless others hold parts of it."""
    unwrap(net)  # raises where it is no module
    processes = processes_training(net)
    return started() if processes.count == 1 and any(map(is_part, net.parameters())) else processes


def _enter_saved(net: nn.Module, parts: Parts, info: JsonObject) -> None:
    """The phases and ranks of the checkpoint, with parameters that are to be filled."""
    sites = switched_modules(parts.root)
    phases = {name: Phase(phase) for name, phase in info["phases"].items()}
    ranks: dict[str, int] = info["ranks"]
    for _, tensor in tensors_of(parts.modules):
        if isinstance(tensor, Parameter):
            tensor.grad = None  # of a step that is not gone on with
            _make_finite_(tensor)
    changing = [
        name for name, (module, *_) in sites.items() if (module.phase, module.rank) != (int(phases[name]), ranks[name])
    ]
    if not changing:
        return
    enter = partial(enter_, net, optimizer=parts.optimizers, averages=parts.averages, carry=Carry.RESET)
    enter(dict.fromkeys(changing, Phase.FULL))
    plan = plan_of(parts.root).with_ranks(ranks)
    replan_(net, plan, parts.optimizers, averages=parts.averages, carry=Carry.RESET)
    enter({name: phases[name] for name in changing}, split=_blank)


@torch.no_grad()
def _make_finite_(parameter: Parameter) -> None:
    """Of a training that has diverged: a switch refuses what is not finite."""
    if parameter.is_floating_point():
        own(parameter).nan_to_num_(0.0, 0.0, 0.0)


def _blank(sites: Sequence[str], layout: Layout, weight: Tensor, rank: int) -> Factors:
    """Factors to be filled, in place of a decomposition."""
    return tuple(weight.new_zeros(shape) for shape in layout.factor_shapes(tuple(weight.shape), rank))


def _told(saved: Saved, parts: Parts) -> tuple[Sequence[StateDict], dict[str, Tensor]]:
    """The optimizers' states by names, and all tensors where they are not in shards."""
    if not parts.optimizers:
        return (), {**saved.tensors}
    if saved.numbered is not None:
        told, tensors = named_of_numbered(*saved.numbered, parts.optimizers[0], parts.names)
        return (told,), {**saved.tensors, **tensors}
    return saved.optimizers or (), {**saved.tensors}


@torch.no_grad()
def _take_(modules: Mapping[str, nn.Module], loaded: Mapping[str, Tensor], aliases: Mapping[str, str]) -> None:
    """Let the modules do what else they do when a state is loaded, and copy what was tied then and is not now."""
    now = dict(tensors_of(modules))
    for name, first in aliases.items():
        if name in now and first in loaded and now[name] is not loaded[first]:
            now[name].copy_(loaded[first])
    for prefix, module in modules.items():
        state = {
            name.removeprefix(f"{prefix}."): each for name, each in loaded.items() if name.startswith(f"{prefix}.")
        }
        does_more = type(module).load_state_dict is not nn.Module.load_state_dict
        (module.load_state_dict if does_more else partial(load_state_, module))(state, strict=False)


def _go_on(saved: Saved, parts: Parts, phases: Phases | None, processes: Processes) -> None:
    """What has no tensors in shards."""
    if phases is not None and saved.phases is not None:
        phases.load_state_dict(saved.phases)
    elif saved.phases is not None and saved.phases["history"]:
        note(parts.root, **{RESUMED: True})
    if not parts.optimizers:
        return
    for scheduler, state in zip(parts.schedulers, saved.schedulers, strict=True):
        scheduler.load_state_dict(state)
    if len(saved.random) == processes.count:
        set_random_state(saved.random[processes.rank] | {"generators": []})


def _whole(state: StateDict) -> StateDict:
    """With whole tensors in the place of sharded ones; all processes call it."""
    found: StateDict = pytree.tree_map_only(Tensor, whole, state)
    return found
