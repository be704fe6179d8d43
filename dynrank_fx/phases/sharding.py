"""Sites of which each process has a part (FSDP2): taken in hand for a switch, one group at a time, and put down again.

What is computed of a site is computed on plain tensors, whoever holds it. So for that time the modules hold plain
parameters, and the optimizer what it keeps of them. Those of a matrix whose rows the processes have are these rows, and
all compute together (see ``rows``). Of others they are all of each, gathered for the one process that computes and
sends; what comes of it is cut into parts at once, before the next group is gathered.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from ..errors import TransitionError
from ..layouts import LinearLayout
from ..phase import Phase
from ..processes import Heard, Outline, Processes, Shards, is_part, is_sharded, own, part_as, whole
from ..rewrite import SiteGroup, Switched
from ..tracing import regions
from .gradients import pending_gradient
from .groups import State, stand_back, stand_in
from .replace import parameters_of
from .rows import Rows
from .values import Value


def in_parts(group: SiteGroup) -> bool:
    """Whether several processes hold the parameters of these sites together."""
    return any(is_part(p) for module in group.firsts for p in parameters_of(module))


def pending_in_parts(
    processes: Processes, groups: Iterable[SiteGroup], training: Mapping[str, Optimizer | None]
) -> frozenset[int]:
    """The ids of the parameters in parts, of these groups, whose gradients wait for a step in any process.

    training: the optimizer of each group, by the group's name. All processes call this.
    """
    held = [(p, training[group.name]) for group in groups for m in group.firsts for p in parameters_of(m) if is_part(p)]
    if not held:
        return frozenset()
    flags = torch.tensor([int(pending_gradient(p, optimizer) is not None) for p, optimizer in held])
    processes.sum_([flags])
    return frozenset(id(p) for (p, _), count in zip(held, flags.tolist(), strict=True) if count)


def rows_of(group: SiteGroup, phase: Phase, optimizer: Optimizer | None, pending: Collection[int]) -> bool:
    """Whether a site can go into a phase on the rows of its weight that each process has.

    optimizer: whose state goes along. pending: ids of the parameters whose gradients wait.
    """
    owner, parameters = group.owner, parameters_of(group.owner)
    outlines = [Outline.of(p) for p in parameters]
    first = outlines[0]
    if group.shared or type(owner.layout) is not LinearLayout or len(owner.shape) != 2 or first is None:
        return False
    plain = {Phase(owner.phase), phase} == {Phase.FULL, Phase.LOW} and not any(id(p) in pending for p in parameters)
    tall = phase is Phase.FULL or owner.shape[0] >= owner.shape[1]
    by_rows = first.mesh.ndim == 1 and first.mesh.size() > 1 and [axis for axis, _ in first.cuts] == [0]
    states = [(p, value) for p in parameters for value in (optimizer.state.get(p, {}) if optimizer else {}).values()]
    alike = all(value.shape == p.shape for p, value in states if isinstance(value, Tensor) and value.ndim)
    return plain and tall and by_rows and alike and parameters[0].dtype != torch.float64


@contextmanager
def in_rows(group: SiteGroup, optimizer: Optimizer | None, processes: Heard, source: int) -> Iterator[None]:
    """Within it a site holds this process's rows of its weight, or of its left factor, and all of the right one, and
    its layout computes on those in all processes together. source: the one that decomposes.
    """
    layout, held, rows = group.layout, _held([group]), Rows(processes, source)
    read = {name: own if name == held[0][1] else _gathered_by(processes) for _, name in held}
    with _standing(optimizer) as stand:
        for site, name in held:
            stand(site, name, read[name], frozenset())
        try:
            for module in group.modules:
                module.layout = rows
            yield
        finally:
            for module in group.modules:
                module.layout = layout


@contextmanager
def in_hand(
    groups: Sequence[SiteGroup], optimizer: Optimizer | None, pending: Collection[int], processes: Heard, source: int
) -> Iterator[None]:
    """Within it the sites of these groups hold whole parameters in one process, the source. All processes call this;
    the others lend what they have.

    optimizer: whose state comes too. pending: ids of the parameters whose gradients do.
    """
    with _standing(optimizer) as stand:
        for site, name in _held(groups):
            stand(site, name, _gathered_by(processes), pending, keep=processes.rank == source)
        yield


def _gathered_by(processes: Heard) -> Callable[[Tensor], Tensor]:
    """``whole``, where none of these processes has failed."""

    def gathered(tensor: Tensor) -> Tensor:
        if is_part(tensor):
            processes.hear()
        return whole(tensor)

    return gathered


@contextmanager
def _standing(optimizer: Optimizer | None) -> Iterator[Callable[..., None]]:
    """What lets a plain parameter stand in the place of one in parts, in its modules and in the optimizer, until the
    block ends.
    """
    taken: list[tuple[Sequence[Switched], str, Parameter, Parameter]] = []

    def stand(
        site: Sequence[Switched],
        name: str,
        read: Callable[[Tensor], Tensor],
        pending: Collection[int],
        keep: bool = True,
    ) -> None:
        """read: what it holds of the one in parts. pending: ids of those whose gradients come too. keep: whether it is
        to stand in this process; else this only takes part in reading.
        """
        part = site[0]._parameters[name]
        assert part is not None
        state: State = optimizer.state.get(part, {}) if optimizer is not None else {}
        plain = Parameter(read(part.detach()), requires_grad=False)
        plain.grad = read(part.grad) if id(part) in pending and part.grad is not None else None
        kept = {key: read(value) if isinstance(value := state[key], Tensor) else value for key in sorted(state)}
        if not keep:
            return
        taken.append((site, name, part, plain))
        for module in site:
            module._parameters[name] = plain
        if optimizer is not None:
            stand_in(optimizer, part, plain, kept)

    try:
        yield stand
    finally:
        for site, name, part, plain in taken:
            for module in site:
                module._parameters[name] = part
            if optimizer is not None:
                stand_back(optimizer, plain)


def _held(groups: Sequence[SiteGroup]) -> list[tuple[Sequence[Switched], str]]:
    """The parameters in parts of these groups: the modules that have each, and its name."""
    sites = [modules for group in groups for modules in group.sites]
    return [(site, name) for site in sites for name in site[0].parameter_names if is_part(site[0]._parameters[name])]


def put_down(
    module: Switched, names: Sequence[str], values: Sequence[Value], like: Parameter, shards: Shards, *, rows: bool
) -> tuple[list[Parameter], list[State]]:
    """What this process keeps of new parameters of a site, and of their optimizer states. like: one that it had.

    rows: whether of the first it is given its rows already.
    """
    parameters, states = [], []
    for index, (name, (value, state)) in enumerate(zip(names, values, strict=True)):
        if rows and index == 0:
            around = Outline.of(like).of_rows(module.shape[0], value).around  # type: ignore[union-attr]
            new = around(value)
            states.append({key: around(kept) if _is_array(kept) else kept for key, kept in state.items()})
        else:
            new = part_as(value, like, shards.axis(module, name, value.shape, like))
            states.append({key: part_as(kept, new) if _is_array(kept) else kept for key, kept in state.items()})
        parameters.append(Parameter(new, requires_grad=like.requires_grad))
    return parameters, states


def _is_array(value: object) -> bool:
    """Whether an optimizer keeps it entry by entry, and not once for a parameter."""
    return isinstance(value, Tensor) and value.ndim > 0


def refuse_unreached(net: nn.Module) -> None:
    """Raise TransitionError for a module sharded by fully_shard that a graph never calls: its hooks would never run."""
    if not any(is_sharded(module) for module in net.modules()):
        return
    for region in regions(net):
        called = {
            str(node.target) for graph in region.net.graphs.values() for node in graph.nodes if node.op == "call_module"
        }
        for name, module in region.net.named_modules():
            if name and is_sharded(module) and name not in called:
                raise TransitionError(
                    f"fully_shard was called on {region.full(name)}, which the graph of the net never calls, so that "
                    "its parameters would never be gathered: shard the net itself, single layers, or several in one "
                    "group, fully_shard([one, other]); or transform with form=dr.Form.LAYERS, which keeps the blocks"
                )
