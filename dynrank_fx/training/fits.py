"""Whether a checkpoint is of this model, plan and optimizer: found out before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from ..errors import StoreError
from ..plan import Plan
from ..rewrite import Switched, plan_of
from .optimizer_state import check_kinds, check_state
from .parts import Parts, tensors_of
from .phases import Phases
from .saved import Saved


def check_fit(saved: Saved, parts: Parts, phases: Phases | None) -> None:
    """Raises StoreError where the checkpoint is of something else, before anything is changed."""
    owners = _owners(parts.modules)
    _check_plan(Plan.from_json(saved.info["plan"]), plan_of(parts.root))
    _check_shapes(saved.shapes, {name: list(tensor.shape) for name, tensor in tensors_of(parts.modules)}, owners)
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


def _check_optimizers(saved: Saved, parts: Parts, owners: Mapping[str, str]) -> None:
    if saved.optimizers is not None:
        check_state(parts.optimizers, saved.optimizers, lambda name: owners.get(f"net.{name}", name), parts.names)
    elif saved.numbered is not None:
        check_kinds(parts.optimizers, [saved.numbered[0]])
    elif saved.digests:
        raise StoreError("the checkpoint was written without an optimizer: make the optimizer when it has been loaded")
