"""That all processes begin a switch with the same, and end it with the same."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from ..aliases import Group
from ..errors import TransitionError
from ..phase import Phase
from ..processes import Processes, agree, digest_of, is_part, of_unlike_wholes, others, outlined
from ..rewrite import GIVEN, SiteGroup, Switched, switched_modules
from ..tracing import meta_of
from .groups import State
from .replace import parameters_of

_PLAIN = (int, float, str, tuple, list, type(None), Tensor)


def agree_before(
    processes: Processes, root: nn.Module, optimizers: Sequence[Optimizer], ignored: Collection[int] = ()
) -> None:
    """Compare all that is to be the same before a switch, or a run: phases and ranks, parameters, and what the
    optimizers hold. Raises TransitionError in all processes, naming the first that differs and where.

    ignored: ids of parameters that each process may have its own of.
    """
    if processes.count == 1:
        return
    named = {name: p for name, p in _named(root, optimizers).items() if id(p) not in ignored}
    agree(
        processes,
        _sites(switched_modules(root).values()) | digest_of(_groups(optimizers) | _held(named, optimizers)),
        TransitionError,
        "nothing was switched; give all the same model, seed, plan and optimizer before they begin, and the same code",
    )


def agree_on_origin(processes: Processes, root: nn.Module) -> None:
    """Compare, once, the weights that ``transform`` was given, of a net in parts. Raises TransitionError in all."""
    parts = {name: p for name, p in root.named_parameters() if is_part(p)}
    if processes.count == 1 or not parts:
        return
    meta = meta_of(root)
    unlike = of_unlike_wholes(processes, parts, meta.get(GIVEN, {}))
    if unlike is not None:
        name, ranks = unlike
        raise TransitionError(
            f"{name} was not the same in all processes when the net was made, {others(ranks, processes.count)}, and "
            "each has kept its part of another model: give all the same seed before the model is made, or load the "
            "same weights into all after fully_shard, which sends none"
        )
    meta.pop(GIVEN, None)


def agree_on(processes: Processes, wanted: Mapping[str, object]) -> None:
    """Compare what every process is about to do, by what is said of it. Raises TransitionError in all."""
    agree(
        processes,
        {name: repr(value) for name, value in wanted.items()},
        TransitionError,
        "nothing was switched; give all the same setting, plan and schedule",
    )


def agree_after(processes: Processes, groups: Iterable[SiteGroup], optimizers: Sequence[Optimizer]) -> None:
    """Compare what a switch has made of its sites. Raises TransitionError in all, which then undo it."""
    if processes.count == 1:
        return
    sites = {modules[0].site: modules for group in groups for modules in group.sites}
    firsts = [modules[0] for modules in sites.values()]
    named = {
        f"{name} of {module.site}": p
        for module in firsts
        for name, p in zip(module.parameter_names, parameters_of(module), strict=True)
    }
    bases = {f"base of {module.site}": module._buffers["base"] for module in firsts}
    agree(
        processes,
        _sites(sites.values()) | digest_of(bases | _held(named, optimizers)),
        TransitionError,
        "net and optimizers are as before the switch; look for memory that fails, or for code that runs in one only",
    )


def _sites(sites: Iterable[Sequence[Switched]]) -> dict[str, object]:
    """Phases, ranks and layouts."""
    return {
        f"the setting of {modules[0].site}": f"{Phase(modules[0].phase).name} at rank {modules[0].rank}, "
        f"{modules[0].layout.name} of {modules[0].shape}"
        for modules in sites
    }


def _named(root: nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, Parameter]:
    """All parameters of the net, and of what else the optimizers train."""
    named = dict(root.named_parameters())
    known = {id(p) for p in named.values()}
    others = [p for each in optimizers for group in each.param_groups for p in group["params"] if id(p) not in known]
    return named | {f"parameter {index} beside the net's": p for index, p in enumerate(others)}


def _held(named: Mapping[str, Parameter], optimizers: Sequence[Optimizer]) -> dict[str, object]:
    """The parameters, and what the optimizers keep of each."""
    held: dict[str, object] = {name: outlined(p.detach()) for name, p in named.items()}
    for optimizer in optimizers:
        for name, p in named.items():
            state: State = optimizer.state.get(p, {})
            held |= {f"{key} of {name}": outlined(value) for key, value in state.items()}
    return held


def _groups(optimizers: Sequence[Optimizer]) -> dict[str, object]:
    """The settings of parameter groups: learning rates and the like."""
    return {
        f"{key} of parameter group {index} of {type(optimizer).__name__}": _value(value)
        for optimizer in optimizers
        for index, group in enumerate[Group](optimizer.param_groups)
        for key, value in group.items()
        if key not in ("params", "param_names") and isinstance(value, _PLAIN)
    }


def _value(value: object) -> object:
    return value.detach() if isinstance(value, Tensor) else value
