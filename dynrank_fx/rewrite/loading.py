"""A state_dict of other phases: the net enters the phases and ranks that the state has, before its weights are loaded.

The names of a state tell the phase of every site (``weight``, or the factors, and beside them ``base``), and the shapes
of the factors its rank. A site of which the state has nothing stays as it is. Nothing is changed where a state has
parts of a site only, or factors that the site cannot have, with ``strict=False`` too: no net is ever a mixture.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..aliases import StateDict
from ..errors import StoreError
from ..ops import Shape
from ..phase import Phase
from ..tracing import is_captured, meta_of, note, refuse_inference
from .groups import site_groups
from .memory_format import in_format_of
from .meta import specialize_
from .switched import Switched

LOADED = "dynrank_loaded"  # in the meta of a net that weights of other phases were loaded into


def follows_states_(root: nn.Module) -> None:
    """From now on ``load_state_dict`` brings the net into the phases of the state, also as a part of another module."""
    if not any(getattr(each, "hook", None) is follow_state for each in root._load_state_dict_pre_hooks.values()):
        root.register_load_state_dict_pre_hook(follow_state)


def forget_states_(root: nn.Module) -> None:
    """Leave nothing of this in a model whose sites are gone."""
    hooks = root._load_state_dict_pre_hooks
    for key in [key for key, each in hooks.items() if getattr(each, "hook", None) is follow_state]:
        del hooks[key]


def follow_state(root: nn.Module, state: StateDict, prefix: str, *_: object) -> None:
    """torch's hook before a state is loaded into ``root``, whose names in it begin with ``prefix``.

    Raises StoreError for a state that has a site in part, or with factors that it cannot have.
    """
    modules: dict[str, list[Switched]] = {}
    prefixes: dict[str, list[str]] = {}
    for name, module in root.named_modules(prefix=prefix.removesuffix("."), remove_duplicate=False):
        if isinstance(module, Switched):
            prefixes.setdefault(module.site, []).append(f"{name}.")
            if module not in modules.setdefault(module.site, []):
                modules[module.site].append(module)
    settings = {}
    for site, (first, *_rest) in modules.items():
        described = [each for each in prefixes[site] if names_in_state(first, state, each)]
        if described:  # a file may hold a weight that has several names under one of them only
            settings[site] = _setting(first, state, described[0])
    for group in site_groups(root):
        of_group = {settings.get(name, (Phase(group.owner.phase), group.owner.rank)) for name in group.names}
        if len({setting if setting[0] is not Phase.FULL else Phase.FULL for setting in of_group}) > 1:
            told = ", ".join(f"{name} in {settings[name][0].name}" for name in group.names if name in settings)
            raise StoreError(f"{', '.join(group.names)} share a factor, and the state has {told}: load all of them")
    changing = {
        site: setting
        for site, setting in settings.items()
        if setting != (Phase(modules[site][0].phase), modules[site][0].rank)
    }
    if changing:
        refuse_inference(StoreError, "load the state")
        for site, (phase, rank) in changing.items():
            _enter(modules[site], phase, rank)
        if is_captured(root):
            note(root, **{LOADED: True})
        _note_ranks(root, {site: rank for site, (_, rank) in settings.items()})
        specialize_(root)


def names_in_state(module: Switched, state: StateDict, prefix: str) -> set[str]:
    """What a state has of the site: ``weight``, names of factors, ``base``."""
    names = {name for name in ("weight", *module.layout.factor_names, "base") if prefix + name in state}
    return names | ({"weight"} if module.bare and prefix.removesuffix(".") in state else set())


def _setting(module: Switched, state: StateDict, prefix: str) -> tuple[Phase, int]:
    """The phase and the rank of a site in a state; the rank in FULL is that of the next cut, which no state tells."""
    names = names_in_state(module, state, prefix)
    low = set(module.names_in(Phase.LOW))
    phases = {frozenset(module.names_in(Phase.FULL)): Phase.FULL, frozenset(low): Phase.LOW}
    phase = (phases | {frozenset(low | {"base"}): Phase.ADAPTOR}).get(frozenset(names))
    if phase is None:
        raise StoreError(
            f"the state has {', '.join(sorted(names))} of {module.site}, which in FULL is its weight, in LOW "
            f"{', '.join(module.names_in(Phase.LOW))}, in ADAPTOR those and base: it is of another plan, or incomplete"
        )
    if phase is Phase.FULL:
        return phase, module.rank
    shapes = [tuple(state[prefix + name].shape) for name in module.names_in(phase)]
    rank = _rank(module, shapes)
    if rank is None:
        raise StoreError(
            f"the state has {module.site} in {phase.name} with factors of {' and '.join(map(str, shapes))}, which no "
            f"rank of the layout {module.layout.name!r} of a weight {module.shape} has: it is of another plan"
        )
    return phase, rank


def _rank(module: Switched, shapes: Sequence[Shape]) -> int | None:
    """The rank at which the factors have these shapes; the present one where several do."""
    # It is one of the sizes.
    for rank in (module.rank, *sorted({size for shape in shapes for size in shape})):
        if list(module.layout.factor_shapes(module.shape, rank)[: len(shapes)]) == list(shapes):
            return rank
    return None


def _enter(modules: Sequence[Switched], phase: Phase, rank: int) -> None:
    """New parameters, to be loaded into."""
    first = modules[0]
    old = [p for name in first.parameter_names if (p := first._parameters[name]) is not None]

    def empty(shape: Shape) -> Tensor:
        return in_format_of(torch.empty(shape, dtype=old[0].dtype, device=old[0].device), old)

    shapes = [first.shape] if phase is Phase.FULL else first.layout.factor_shapes(first.shape, rank)
    names = first.names_in(phase)
    new = {
        name: nn.Parameter(empty(shape), requires_grad=old[0].requires_grad)
        for name, shape in zip(names, shapes, strict=False)  # a shared right is its owner's
    }
    base = empty(first.shape) if phase is Phase.ADAPTOR else None
    for module in modules:
        module.rank = rank
        module.hold(phase, new, base)


def _note_ranks(root: nn.Module, ranks: dict[str, int]) -> None:
    meta = meta_of(root) if is_captured(root) else {}
    if "dynrank" in meta:
        meta["dynrank"] = meta["dynrank"].with_ranks(ranks)
