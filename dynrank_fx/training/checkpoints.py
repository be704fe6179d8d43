"""Checkpoints of a loop of one's own, by one process or several: everything that training goes on from, in one folder.

The tensors of net and optimizers lie there in shards, see ``shard_files``: whatever number of processes wrote
them, and however the net was wrapped or sharded then, any other goes on. The rest is one small file, which is written
last. A folder takes the place of the one before it when all of it is on the disk, in every process.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils import _pytree as pytree

from .. import files, store
from ..aliases import JsonObject, StateDict
from ..checks import checked_path
from ..errors import StoreError
from ..layouts import Factors, Layout
from ..phase import Phase
from ..phases import Carry, Optimizers, averages_of, enter_, info_of, optimizers_in, replan_, state_of
from ..plan import Plan
from ..processes import Processes, ignored_by, is_part, own, processes_training, started, whole, wrappers_of
from ..randomness import random_state, set_random_state
from ..rewrite import Switched, plan_of, switched_modules
from ..tracing import load_state_, note, unwrap
from .facts import check_scheduler
from .phases import RESUMED, Phases
from .saved import STATE, Saved, read_saved
from .state_tree import flatten


@dataclass(frozen=True)
class Loaded:
    """What a checkpoint held beside what has been brought to it.

    Attributes:
        phases: The state of the phases, for ``Phases(..., resume=)`` where none was given; None where the checkpoint
            was written without.
        extra: What ``save_checkpoint`` was given as ``extra``; of a run of ``dynrank-fx train`` its epoch and step.
    """

    phases: StateDict | None
    extra: StateDict


@dataclass(frozen=True)
class _Parts:
    """What goes into a checkpoint, or is brought to one."""

    root: nn.Module
    averages: Sequence[nn.Module]
    optimizers: Sequence[Optimizer]
    schedulers: Sequence[LRScheduler]

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Those that have tensors, by what their names begin with."""
        return {"net": self.root, **{f"average.{i}": each for i, each in enumerate(self.averages)}}

    @property
    def names(self) -> dict[int, str]:
        """The names of the net's parameters, by their ids."""
        state_of(self.root)  # FSDP may hold other parameters since the last forward, until it is asked for these
        return {id(parameter): name for name, parameter in self.root.named_parameters()}


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

    X
    generators of Python, NumPy and torch are in it, those of each process. Buffers are those of the first.

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
        DynrankWarning: Where weights, buffers or the optimizer's state are not finite.
    """
    from .optimizer_state import named_state  # with torch.distributed, which takes a while

    if not isinstance(extra, Mapping | None):
        raise StoreError(f"extra is {extra!r}: give a dict of plain values and tensors, or leave it out")
    processes, folder = _processes(net), checked_path(folder)
    with processes.all_or_none(StoreError, "saving"):
        parts = _parts(net, optimizer, phases, lr_scheduler)
        tensors, shapes, aliases = _stored(parts.modules)
        told, moments = named_state(parts.optimizers, parts.names)
        if not processes.first:
            tensors, moments = _of_all(tensors, moments, {parts.names[each] for each in ignored_by(wrappers_of(net))})
        info = {"id": uuid4().hex, "shapes": shapes, "aliases": aliases, **info_of(parts.root)}
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
    from .shard_files import names_of_shards, write_shards

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
    saved. All processes call it. The checkpoint may be of another number of processes, and of a net that was wrapped or
    sharded in another way. The random generators go on too where the number is the same. A run of ``dynrank-fx train``
    loads as well, and so does a net that ``save`` wrote.

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
    from .optimizer_state import restore_state_
    from .shard_files import check_shards, copy_whole_, read_shards_

    processes, folder = _processes(net), checked_path(folder)
    saved = read_saved(folder, processes)
    if saved.digests:
        check_shards(folder, saved.digests, processes)
    with processes.all_or_none(StoreError, "loading"):
        parts = _parts(net, optimizer, phases, lr_scheduler)
        _check(saved, parts, phases)
    _enter_saved(net, parts, saved.info)
    loaded = {name: tensor for name, tensor in _tensors(parts.modules) if name in saved.stored}
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
    """Those that train the net; where nothing says which, all."""
    processes = processes_training(net)
    return processes if processes.count > 1 else started()


def _parts(
    net: nn.Module,
    optimizer: Optimizers | None,
    phases: Phases | None,
    lr_scheduler: LRScheduler | Sequence[LRScheduler] | None,
) -> _Parts:
    root = unwrap(net)
    plan_of(root)
    if not isinstance(phases, Phases | None):
        raise StoreError(f"phases is {phases!r}: give the Phases at work, or leave it out")
    if phases is not None and unwrap(phases.net) is not root:
        raise StoreError(
            "the Phases are of another net than the one that was given: give the net that they were made with"
        )
    its = () if phases is None or phases.lr_scheduler is None else (phases.lr_scheduler,)
    given = its if lr_scheduler is None else lr_scheduler if isinstance(lr_scheduler, list | tuple) else (lr_scheduler,)
    optimizers = phases.optimizers if phases is not None and optimizer is None else optimizers_in(optimizer)
    for each in given:
        check_scheduler(each, optimizers)
    return _Parts(
        root,
        () if phases is None else averages_of(phases.averages, root),
        optimizers,
        tuple(given),
    )


def _tensors(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor by every name that it has."""
    for prefix, module in modules.items():
        for name, tensor in state_of(module).items():
            yield f"{prefix}.{name}", tensor


def _stored(modules: Mapping[str, nn.Module]) -> tuple[dict[str, Tensor], dict[str, list[int]], dict[str, str]]:
    """Every tensor once; the shapes by all names; which names are further ones of which tensor."""
    first, stored, shapes, aliases = dict[int, str](), dict[str, Tensor](), dict[str, list[int]](), dict[str, str]()
    for name, tensor in _tensors(modules):
        shapes[name] = list(tensor.shape)
        if id(tensor) in first:
            aliases[name] = first[id(tensor)]
        else:
            first[id(tensor)], stored[name] = name, tensor
    return stored, shapes, aliases


def _check(saved: Saved, parts: _Parts, phases: Phases | None) -> None:
    """Raises StoreError where the checkpoint is of something else, before anything is changed."""
    owners = _owners(parts.modules)
    _check_plan(Plan.from_json(saved.info["plan"]), plan_of(parts.root))
    _check_shapes(saved.shapes, {name: list(tensor.shape) for name, tensor in _tensors(parts.modules)}, owners)
    if phases is not None and saved.phases is None:
        raise StoreError("the checkpoint was written without phases: make the Phases when it has been loaded")
    if parts.optimizers:
        _check_optimizers(saved, parts, owners)
    if parts.optimizers and len(saved.schedulers) != len(parts.schedulers):
        raise StoreError(
            f"the checkpoint has the state of {len(saved.schedulers)} learning-rate schedulers, and "
            f"{len(parts.schedulers)} were given: give the same ones"
        )


def _owners(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """The site of every name that its parameters, in whatever phase, can have."""
    owners = dict[str, str]()
    for prefix, root in modules.items():
        for name, module in root.named_modules(prefix=prefix, remove_duplicate=False):
            if isinstance(module, Switched):
                owners |= {f"{name}.{own}": module.site for own in ("weight", *module.layout.factor_names, "base")}
                owners |= {name: module.site} if module.bare else {}
    return owners


def _check_plan(then: Plan, now: Plan) -> None:
    of_then, of_now = ({row.site.name: row for row in plan.sites} for plan in (then, now))
    for name in dict.fromkeys([*of_then, *of_now]):
        one, other = of_then.get(name), of_now.get(name)
        if one is None or other is None:
            where = (
                "of the net, and none of the checkpoint" if one is None else "of the checkpoint, and none of the net"
            )
            raise StoreError(f"{name} is a site {where}: transform the same model by the same plan")
        said = [(row.site.shape, row.layout.name, row.sharing) for row in (one, other)]
        if said[0] != said[1] or one.layout != other.layout:
            shape, layout, sharing = said[0]
            raise StoreError(
                f"{name} was a weight {shape} with the layout {layout!r}{_with(sharing)}, and is {other.site.shape} "
                f"with {other.layout.name!r}{_with(other.sharing)} in the net: transform the same model by the same "
                "plan"
            )


def _with(sharing: Sequence[str]) -> str:
    return f" shared by {', '.join(sharing)}" if sharing else ""


def _check_shapes(then: Mapping[str, list[int]], now: Mapping[str, list[int]], owners: Mapping[str, str]) -> None:
    """Of what is not a site's, which has other tensors in every phase."""
    for name in dict.fromkeys([*then, *now]):
        if name not in owners and then.get(name) != now.get(name):
            old, new = (f"of the shape {tuple(each[name])}" if name in each else "not there" for each in (then, now))
            raise StoreError(
                f"{name.removeprefix('net.')} is {old} in the checkpoint, and {new} now: it is of another model; make "
                "the same one"
            )


def _check_optimizers(saved: Saved, parts: _Parts, owners: Mapping[str, str]) -> None:
    from .optimizer_state import check_kinds, check_state

    if saved.optimizers is not None:
        check_state(parts.optimizers, saved.optimizers, lambda name: owners.get(f"net.{name}", name), parts.names)
    elif saved.numbered is not None:
        check_kinds(parts.optimizers, [saved.numbered[0]])
    elif saved.digests:
        raise StoreError("the checkpoint was written without an optimizer: make the optimizer when it has been loaded")


def _enter_saved(net: nn.Module, parts: _Parts, info: JsonObject) -> None:
    """The phases and ranks of the checkpoint, with parameters that are to be filled."""
    sites = switched_modules(parts.root)
    phases = {name: Phase(phase) for name, phase in info["phases"].items()}
    ranks: dict[str, int] = info["ranks"]
    for tensor in state_of(parts.root).values():
        if isinstance(tensor, Parameter):
            tensor.grad = None  # of a step that is not gone on with, as are values that diverged
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
    """A switch refuses what is not finite."""
    if parameter.is_floating_point():
        own(parameter).nan_to_num_(0.0, 0.0, 0.0)


def _blank(sites: Sequence[str], layout: Layout, weight: Tensor, rank: int) -> Factors:
    """Factors to be filled, in place of a decomposition."""
    return tuple(weight.new_zeros(shape) for shape in layout.factor_shapes(tuple(weight.shape), rank))


def _told(saved: Saved, parts: _Parts) -> tuple[Sequence[StateDict], dict[str, Tensor]]:
    """The optimizers' states by names, and all tensors where they are not in shards."""
    from .optimizer_state import named_of_numbered

    if not parts.optimizers:
        return (), {**saved.tensors}
    if saved.numbered is not None:
        told, tensors = named_of_numbered(*saved.numbered, parts.optimizers[0], parts.names)
        return (told,), {**saved.tensors, **tensors}
    return saved.optimizers or (), {**saved.tensors}


@torch.no_grad()
def _take_(modules: Mapping[str, nn.Module], loaded: Mapping[str, Tensor], aliases: Mapping[str, str]) -> None:
    """Let the modules do what else they do when a state is loaded, and copy what was tied then and is not now."""
    now = dict(_tensors(modules))
    for name, first in aliases.items():
        if name in now and first in loaded and now[name] is not loaded[first]:
            now[name].copy_(loaded[first])
    for prefix, module in modules.items():
        state = {
            name.removeprefix(f"{prefix}."): each for name, each in loaded.items() if name.startswith(f"{prefix}.")
        }
        own = type(module).load_state_dict is not nn.Module.load_state_dict
        (module.load_state_dict if own else partial(load_state_, module))(state, strict=False)


def _go_on(saved: Saved, parts: _Parts, phases: Phases | None, processes: Processes) -> None:
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


def _of_all(
    tensors: Mapping[str, Tensor], moments: Mapping[str, Tensor], ignored: Collection[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Those of which all processes have the same, or a shard each. Every process may have buffers of its own, and
    parameters that DistributedDataParallel was told to ignore.
    """
    endings = tuple(f".{name}" for name in ignored)
    shared = {name: t for name, t in tensors.items() if isinstance(t, Parameter) or is_part(t)}
    ours, theirs = ({n: t for n, t in each.items() if not n.endswith(endings)} for each in (shared, moments))
    return ours, theirs


def _whole(state: StateDict) -> StateDict:
    """With whole tensors in the place of sharded ones; all processes call it."""
    found: StateDict = pytree.tree_map_only(Tensor, whole, state)
    return found
