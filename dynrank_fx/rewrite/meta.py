"""The plan of a net, and the code that it runs in its present phases and ranks."""

from __future__ import annotations

import copy

from torch import nn

from ..errors import PlanError
from ..plan import Plan
from ..tracing import is_captured, meta_of, regions, unwrap
from .switched import switched_modules


def plan_of(net: nn.Module) -> Plan:
    """The plan a net was factored by. Raises PlanError for a module that ``factorize`` did not make."""
    root = unwrap(net)
    plan = meta_of(root).get("dynrank") if is_captured(root) else None
    if plan is None:
        raise PlanError(f"{type(net).__name__} has no plan: it was not made by transform or factorize")
    return plan


def set_plan(net: nn.Module, plan: Plan) -> None:
    """Note the plan in the net's ``meta``, which survives ``deepcopy``."""
    meta_of(net)["dynrank"] = plan


def specialize_(root: nn.Module) -> None:
    """Run the code of the present setting in every Net of the tree: after phases or ranks have changed."""
    for region in regions(root):
        sites = switched_modules(region.net).values()
        region.net.specialize(tuple((modules[0].phase, modules[0].rank) for modules in sites))


def a_twin(net: nn.Module) -> nn.Module:
    """A copy of the net in evaluation mode, to be cut."""
    source = unwrap(net)
    if not is_captured(source):
        raise PlanError(f"{type(net).__name__} cannot be truncated: it was not made by transform or factorize")
    twin = copy.deepcopy(source)
    twin.zero_grad()  # the copy brings pending gradients along, which a switch refuses to lose
    if not getattr(twin, "fixed_mode", False):
        twin.eval()
    return twin
