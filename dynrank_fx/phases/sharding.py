"""Sites of which each process has a part (FSDP2): taken in hand for a switch, one group at a time, and put down again.

What is computed of a site is computed on plain tensors, whoever holds it. So for that time the modules hold plain
parameters, and the optimizer what it keeps of them: all of each, gathered for the one process that computes and sends.
What comes of it is cut into parts at once, before the next group is gathered.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from ..errors import TransitionError
from ..processes import Processes, Shards, is_part, is_sharded, part_as, whole
from ..rewrite import SiteGroup, Switched
from ..tracing import regions
from .gradients import pending_gradient
from .groups import State, stand_back, stand_in
from .replace import parameters_of
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


@contextmanager
def in_hand(
    groups: Sequence[SiteGroup], optimizer: Optimizer | None, pending: Collection[int], *, here: bool
) -> Iterator[None]:
    """Within it the sites of these groups hold whole parameters in one process. All processes call this.

    optimizer: whose state comes too. pending: ids of the parameters whose gradients do. here: whether this process is
    the one; the others lend what they have.
    """
    taken: list[tuple[Sequence[Switched], str, Parameter, Parameter]] = []
    try:
        for site, name in _held(groups):
            part = site[0]._parameters[name]
            assert part is not None
            state: State = optimizer.state.get(part, {}) if optimizer is not None else {}
            stand = Parameter(whole(part), requires_grad=False)
            stand.grad = whole(part.grad) if id(part) in pending and part.grad is not None else None
            kept = {key: _whole(state[key]) for key in sorted(state)}
            if not here:
                continue
            taken.append((site, name, part, stand))
            for module in site:
                module._parameters[name] = stand
            if optimizer is not None:
                stand_in(optimizer, part, stand, kept)
        yield
    finally:
        for site, name, part, stand in taken:
            for module in site:
                module._parameters[name] = part
            if optimizer is not None:
                stand_back(optimizer, stand)


def _held(groups: Sequence[SiteGroup]) -> list[tuple[Sequence[Switched], str]]:
    """The parameters in parts of these groups: the modules that have each, and its name."""
    sites = [modules for group in groups for modules in group.sites]
    return [(site, name) for site in sites for name in site[0].parameter_names if is_part(site[0]._parameters[name])]


def _whole(value: object) -> object:
    return whole(value) if isinstance(value, Tensor) else value


def put_down(
    module: Switched, names: Sequence[str], values: Sequence[Value], like: Parameter, shards: Shards
) -> tuple[list[Parameter], list[State]]:
    """What this process keeps of new parameters of a site, and of their optimizer states. like: one that it had."""
    parameters, states = [], []
    for name, (value, state) in zip(names, values, strict=True):
        axis = shards.axis(module, name, value.shape, like)
        parameter = Parameter(part_as(value, like, axis), requires_grad=like.requires_grad)
        parameters.append(parameter)
        states.append({key: _part(kept, parameter) for key, kept in state.items()})
    return parameters, states


def _part(value: object, parameter: Parameter) -> object:
    return part_as(value, parameter) if isinstance(value, Tensor) and value.ndim else value


def refuse_unreached(net: nn.Module) -> None:
    """Raise TransitionError for a module sharded by fully_shard that a graph never calls: its hooks would never run."""
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
