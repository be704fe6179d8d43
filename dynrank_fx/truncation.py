"""The end of training: a factored net cut for good into an ordinary torch module."""

from __future__ import annotations

import copy

from torch import nn

from .errors import PlanError
from .inlining import inline
from .locate import is_captured
from .net import unwrap
from .phase import Phase
from .switched import switched_modules
from .transition import enter_


def truncate(net: nn.Module) -> nn.Module:
    """The evaluation graph of the net with every site factored: plain torch, with nothing of this package left in it.

    Sites in LOW keep their factors; sites in FULL are cut by plain SVD to the ranks of the plan. The net stays as it
    is. Raises PlanError for a module that ``transform`` did not make, TransitionError for non-finite weights.
    """
    source = unwrap(net)
    if not is_captured(source):
        raise PlanError(f"{type(net).__name__} cannot be truncated: it was not made by transform or factorize")
    twin = copy.deepcopy(source)
    twin.zero_grad()  # the copy brings pending gradients along, which a switch refuses to lose
    if switched_modules(twin):
        enter_(twin, Phase.LOW)
    if not getattr(twin, "fixed_mode", False):
        twin.eval()
    return inline(twin)
