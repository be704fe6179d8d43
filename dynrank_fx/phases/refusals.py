"""What a switch refuses before it touches anything."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import TransitionError
from ..phase import Phase
from ..processes import Shards, in_pipeline, is_part, own
from ..rewrite import SiteGroup, Switched
from .carry import Carry
from .gradients import pending_gradient
from .groups import holder_in, holders_of
from .replace import parameters_of
from .sharding import refuse_unreached

_INSTEAD = "wrap the net in DistributedDataParallel instead"
# By the name of the class, since DeepSpeed need not be installed.
_REFUSED = {
    "DataParallel": f"which copies it for every batch: {_INSTEAD}, with a process for each device",
    "FullyShardedDataParallel": f"the first FSDP, which keeps parameters flattened into one: {_INSTEAD}",
    "DeepSpeedEngine": f"which keeps parameters and the optimizer's state in buffers of its own: {_INSTEAD}",
}


def refuse_wrapped(net: nn.Module) -> None:
    """Raises TransitionError for a net that something wraps whose processes a switch cannot bring along, whatever is
    given of it.
    """
    if in_pipeline(net):
        raise TransitionError(
            "the net is in a stage of a pipeline (torch.distributed.pipelining); each process has another part of it "
            "that would change phase by itself: train the whole net by fully_shard, which leaves each process a part "
            "of every weight, or in DistributedDataParallel"
        )
    if not isinstance(net, nn.Module):
        return  # whoever is given it says what is wrong with it
    for module in net.modules():
        for kind in type(module).__mro__:
            if kind.__name__ in _REFUSED:
                raise TransitionError(f"the net is wrapped in {kind.__name__}, {_REFUSED[kind.__name__]}")
    refuse_unreached(net)


def refuse_untrained(sites: Mapping[str, Sequence[Switched]], optimizers: Sequence[Optimizer]) -> None:
    """Where optimizers are given, they train all of what trains of the sites: what they lack would stand still."""
    if not optimizers:
        return
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    trained = [(name, p) for name, modules in sites.items() for p in parameters_of(modules[0]) if p.requires_grad]
    lacking = [name for name, p in trained if id(p) not in held]
    if lacking and any(is_part(p) for _, p in trained):
        raise TransitionError(
            f"{lacking[0]} is sharded, and no optimizer that was given holds its part: an optimizer made before "
            "fully_shard trains parameters that are no longer the net's; make it after, and give all of them"
        )
    if lacking and len(lacking) == len(trained):
        raise TransitionError(
            "the optimizer holds no parameter of the sites to switch: build it over the transformed net's parameters()"
        )
    if lacking:
        raise TransitionError(
            f"{lacking[0]} trains, and no optimizer that was given holds it: give all of them, "
            "enter_(net, ..., [one, two]); make them after weights of other phases were loaded; or freeze the site by "
            "requires_grad_(False)"
        )


def check_values(
    groups: Iterable[SiteGroup],
    optimizers: Sequence[Optimizer],
    carry: Carry = Carry.RESET,
    *,
    shards: Shards,
    finite: Callable[[], bool],
) -> None:
    """Everything that can be wrong with values, before anything is touched. carry: of the optimizers' state. finite:
    what tells whether all gradients are.
    """
    lost, holders = [], holders_of(optimizers)
    for group in groups:
        present = [(module, p) for module in group.firsts for p in parameters_of(module)]
        for modules in group.sites:
            shards.refuse(modules[0].site, modules, modules[0].parameter_names)
        optimizer = holder_in(holders, [p for _, p in present])
        for module, parameter in present:
            if not bool(torch.isfinite(own(parameter)).all()):
                raise TransitionError(
                    f"{module.site} has non-finite weights: nothing was switched; look for a diverged step, and lower "
                    f"the learning rate"
                )
            state = optimizer.state.get(parameter, {}) if optimizer is not None and carry is Carry.MOVE else {}
            moments = [
                value for value in state.values() if isinstance(value, Tensor) and value.shape == parameter.shape
            ]
            if not all(bool(torch.isfinite(own(moment)).all()) for moment in moments):
                raise TransitionError(
                    f"the optimizer's state of {module.site} is not finite: nothing was switched; look for a diverged "
                    "step, or drop the state by carry=Carry.RESET"
                )
            if holders.get(id(parameter)) not in (optimizer, None):
                raise TransitionError(
                    f"the parameters of {', '.join(group.names)} are held by several optimizers: a switch replaces "
                    "them by others, which one optimizer has to take; give them all to one"
                )
            if module.phase != int(Phase.FULL) and pending_gradient(parameter, optimizer) is not None:
                lost.append(module.site)
    if lost and finite():
        raise TransitionError(
            f"{lost[0]} has a pending gradient at its factors, which does not tell that of another phase: step the "
            "optimizer or call its zero_grad() before the switch; gradients that a step has used are known from the "
            "first enter_ (or Phases) on that was given the optimizer"
        )
    if any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in optimizers):
        raise TransitionError("LBFGS keeps one history over all parameters: switch without it, then make a new LBFGS")


def check_held(groups: Iterable[SiteGroup], ignored: Collection[int]) -> None:
    """Raises TransitionError for a site whose parameters, by their ids, each process has its own of."""
    for group in groups:
        for module in group.firsts:
            if any(id(p) in ignored for p in parameters_of(module)):
                raise TransitionError(
                    f"{module.site} is among the parameters that DistributedDataParallel was told to ignore, so that "
                    "each process has its own, and a switch would give all the same: exclude it by transform(exclude=)"
                )
