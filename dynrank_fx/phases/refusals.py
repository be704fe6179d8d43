"""What a switch refuses before it touches anything."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import TransitionError
from ..phase import Phase
from ..rewrite import SiteGroup, Switched
from .carry import Carry
from .gradients import all_finite, pending_gradient
from .groups import holder_in, holders_of
from .replace import parameters_of, refuse_sharded


def refuse_inference() -> None:
    """Raises TransitionError where no parameter can be made that trains."""
    if torch.is_inference_mode_enabled():
        raise TransitionError("within torch.inference_mode no weight can be made that trains: switch phases outside it")


def refuse_wrapped(root: nn.Module) -> None:
    """Raises TransitionError for a net that is wrapped for several processes."""
    for module in root.modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise TransitionError(
                "the net is wrapped in DistributedDataParallel, whose ranks would go apart: enter_ the module "
                "inside, then wrap it again"
            )
        if any(kind.__name__ in ("FullyShardedDataParallel", "FSDPModule") for kind in type(module).__mro__):
            raise TransitionError(
                "the net is sharded by FSDP, which would keep the old parameters: gather it, switch, and shard it again"
            )


def refuse_untrained(sites: Mapping[str, Sequence[Switched]], optimizers: Sequence[Optimizer]) -> None:
    """Where optimizers are given, they train all of what trains of the sites: what they lack would stand still."""
    if not optimizers:
        return
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    trained = [(name, p) for name, modules in sites.items() for p in parameters_of(modules[0]) if p.requires_grad]
    lacking = [name for name, p in trained if id(p) not in held]
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
    root: nn.Module, groups: Iterable[SiteGroup], optimizers: Sequence[Optimizer], carry: Carry = Carry.RESET
) -> None:
    """Everything that can be wrong with values, before anything is touched. carry: of the optimizers' state."""
    lost, holders = [], holders_of(optimizers)
    for group in groups:
        present = [(module, p) for module in group.firsts for p in parameters_of(module)]
        optimizer = holder_in(holders, [p for _, p in present])
        for module, parameter in present:
            refuse_sharded(module.site, parameter)
            if not bool(torch.isfinite(parameter).all()):
                raise TransitionError(
                    f"{module.site} has non-finite weights: nothing was switched; look for a diverged step, and lower "
                    f"the learning rate"
                )
            state = optimizer.state.get(parameter, {}) if optimizer is not None and carry is Carry.MOVE else {}
            moments = [
                value for value in state.values() if isinstance(value, Tensor) and value.shape == parameter.shape
            ]
            if not all(bool(torch.isfinite(moment).all()) for moment in moments):
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
    if lost and all_finite(root, optimizers):
        raise TransitionError(
            f"{lost[0]} has a pending gradient at its factors, which does not tell that of another phase: step the "
            "optimizer or call its zero_grad() before the switch; gradients that a step has used are known from the "
            "first enter_ (or Phases) on that was given the optimizer"
        )
    if any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in optimizers):
        raise TransitionError("LBFGS keeps one history over all parameters: switch without it, then make a new LBFGS")
