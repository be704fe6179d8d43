"""A net that is made anew, in the phases of a checkpoint: before its weights are loaded by name."""

from __future__ import annotations

from torch import nn

from ..aliases import StateDict
from ..phases import enter_, replan_
from ..rewrite import plan_of, switched_modules
from ..tracing import note, unwrap
from .records import history_in

RESUMED = "dynrank_resumed"  # in the meta of a net that is in the phases of a checkpoint


def resume_phases_(net: nn.Module, state: StateDict) -> None:
    """Bring a freshly transformed net into the phases of a checkpoint, so that its weights load by name.

    Call it before the optimizer is made, and before weights are loaded.

    Args:
        net: What ``transform`` made.
        state: What ``Phases.state_dict()`` gave.

    Raises:
        StoreError: For a state that is of something else.
        PlanError: For ranks that a site cannot have.
        TransitionError: For sites that the net does not have.
    """
    (_, history), root = history_in(state), unwrap(net)
    if not history:
        return
    last = history[-1]
    plan = {name: modules[0].rank for name, modules in switched_modules(root).items()}
    ranks = {name: rank for name, rank in last.ranks.items() if plan.get(name) != rank}
    if ranks:
        replan_(net, plan_of(net).with_ranks(ranks))
    enter_(net, last.phases)
    note(root, **{RESUMED: True})
