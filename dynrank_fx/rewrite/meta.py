"""The plan of a net, and the code that it runs in its present phases and ranks."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

import torch
from torch import nn

from ..errors import PlanError
from ..layouts import Layout
from ..phase import Phase
from ..plan import Plan
from ..processes import entries_of, started
from ..tracing import is_captured, meta_of, note, regions, shell, unwrap
from .switched import switched_modules


def plan_of(net: nn.Module) -> Plan:
    """The plan by which a net was factored, with its present ranks.

    Args:
        net: What ``transform`` or ``factorize`` made, possibly within ``torch.compile``.

    Returns:
        The plan.

    Raises:
        PlanError: For a module that has no plan.
    """
    root = unwrap(net)
    plan: Plan | None = meta_of(root).get("dynrank") if is_captured(root) else None
    if plan is None:
        raise PlanError(f"{type(net).__name__} has no plan: it was not made by transform or factorize")
    return plan


GIVEN = "dynrank_given"  # in the meta of a net of which processes have parts: some entries of what each was given


def note_given(net: nn.Module) -> None:
    """Note some entries of the weights, where several processes run, which may keep parts of unlike ones."""
    if started().count > 1:
        note(net, **{GIVEN: entries_of(dict(net.named_parameters()))})


def set_plan(net: nn.Module, plan: Plan) -> None:
    """Note the plan in the net's ``meta``, which survives ``deepcopy``."""
    note(net, dynrank=plan)


def set_layouts_(net: nn.Module, layouts: Mapping[str, Layout]) -> None:
    """Give sites in FULL other layouts of as many factors."""
    plan = plan_of(net).with_layouts(layouts)
    rows = {row.site.name: row for row in plan.sites}
    for name, modules in switched_modules(net).items():
        for module in modules if name in layouts else ():
            assert module.phase == int(Phase.FULL)
            assert module.layout.factor_names == layouts[name].factor_names
            module.layout = layouts[name]
            module.rank = rows[name].rank  # with which go the stages
    set_plan(net, plan)
    specialize_(net)


def specialize_(root: nn.Module) -> None:
    """Run the code of the present setting in every Net of the tree: after phases or ranks have changed."""
    for region in regions(root):
        sites = switched_modules(region.net).values()
        region.net.specialize(tuple((modules[0].phase, modules[0].rank) for modules in sites))


def a_twin(net: nn.Module) -> nn.Module:
    """The net in evaluation mode, to be cut: its sites change phase by themselves, its weights share the net's values
    until they are replaced. Run it inside ``same_values`` of the net, and let what is left be its own by ``own_``.
    """
    source = unwrap(net)
    if not is_captured(source):
        raise PlanError(f"{type(net).__name__} cannot be truncated: it was not made by transform or factorize")
    twin = shell(source)
    if not getattr(twin, "fixed_mode", False):
        twin.eval()
    return twin


def in_low(net: nn.Module) -> nn.Module:
    """A copy of a net in FULL with every site in LOW and random numbers for factors: to be timed, and no more."""
    twin, random = copy.deepcopy(net), torch.Generator().manual_seed(0)
    for modules in switched_modules(twin).values():
        site = modules[0]
        weight, shapes = site.weight, site.layout.factor_shapes(site.shape, site.rank)
        numbers = [torch.randn(tuple(shape), generator=random) / math.sqrt(math.prod(shape[1:])) for shape in shapes]
        factors = [nn.Parameter(each.to(weight), requires_grad=weight.requires_grad) for each in numbers]
        names = site.names_in(Phase.LOW)
        for module in modules:
            module.hold(Phase.LOW, dict(zip(names, factors, strict=False)))
    specialize_(twin)
    return twin
