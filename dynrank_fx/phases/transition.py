"""Phase changes: every site into its phase, or to its rank, the optimizer's state along; undone whole if one fails."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TypeVar

from torch import nn

from ..errors import PlanError, TransitionError
from ..phase import Phase
from ..plan import Plan, checked_plan
from ..processes import Shards, check_wrapper, processes_training, wrappers_of
from ..rewrite import SiteGroup, plan_of, set_plan, site_groups, specialize_, switched_modules
from ..schedules import Setting
from ..tracing import is_captured, meta_of, refuse_inference, unwrap
from .agreement import agree_on, agree_on_origin
from .averages import averages_of, sites_of_average, warn_of_left_out
from .carry import Carry, checked_carry
from .gradients import note_steps
from .groups import Optimizers, optimizers_in
from .refusals import refuse_untrained, refuse_wrapped
from .setting import phases_in
from .switch import Changed, Move, Transition, switch
from .values import Split

T = TypeVar("T")


def enter_(
    net: nn.Module,
    setting: Setting,
    optimizer: Optimizers | None = None,
    *,
    averages: object = (),
    carry: Carry = Carry.MOVE,
    split: Split | None = None,
) -> Transition:
    """Bring every site into its phase, replacing parameters in the net and in the optimizer, whose state goes along.

    Sites change one by one, the old parameters being freed before the next site is touched; what they held waits in a
    temporary file, so that any failure, interruption included, puts net and optimizer back as they were.

    Gradients that the optimizer's last step has used go with their parameters: ``zero_grad`` may come before or after a
    switch. Those that wait for a step (gradient accumulation) are carried from FULL to factors, and the switch from
    factors is refused. What a step has used is known from the first call on that is given the optimizer; call it (or
    make ``Phases``) before the first step.

    Args:
        net: What ``transform`` made, possibly within ``torch.compile``.
        setting: A phase for all sites, or a mapping of site names (or shell patterns) to phases; sites that it does not
            name keep theirs.
        optimizer: The optimizer over the net's parameters, if there is one, or all of them. New parameters go to the
            optimizer and the group of those that they replace.
        averages: What averages the net's weights, one or several: ``AveragedModel``, ``ModelEmaV3``, or a copy of
            the net. Each has to be given to every switch from when it was made.
        carry: What to do with the optimizer's state; see ``Carry``.
        split: How the factors of sites that enter LOW are found (``Calibration.split``); by default the truncated SVD
            of the weight.

    Returns:
        What became of each site that changed.

    Raises:
        TransitionError: For a pattern that matches nothing, non-finite weights, pending gradients that cannot be
            carried, sharded or wrapped parameters, a site that trains and is in none of the optimizers, and an average
            of another net or of other phases. Nothing has been changed then.

    Warns:
        DynrankWarning: Where the optimizer's state was reset since it could not be moved, and of an average that is
            about and could be the net's, and was not given.
    """
    return replace(_entered(net, setting, optimizer, averages, carry, split), model=net)


def tried(net: nn.Module, phase: Phase, do: Callable[[], T]) -> T:
    """What ``do`` gives while all sites are in a phase, of a net in parts, which no process can copy. Afterwards the
    net is as it was, in the same parameters, and what an optimizer has of them has not been touched.
    """
    root, given = unwrap(net), list[T]()

    def then() -> None:
        specialize_(root)
        given.append(do())
        Shards([root]).settle()
        raise _TriedError

    try:
        _entered(net, phase, None, (), Carry.RESET, None, then)
    except _TriedError:
        specialize_(root)
        return given[0]
    return do()  # they are in that phase


class _TriedError(Exception):
    """What undoes a switch that was for a while only."""


def _entered(
    net: nn.Module,
    setting: Setting,
    optimizer: Optimizers | None,
    averages: object,
    carry: Carry,
    split: Split | None,
    then: Callable[[], object] | None = None,
) -> Transition:
    """As ``enter_``. then: see ``switch``."""
    processes = processes_training(net)
    with processes.all_or_none(TransitionError, "the switch"):
        changed = _checked(net, optimizer, averages, carry)
        sites = switched_modules(changed.root)
        if not sites:
            raise TransitionError(
                "the net has no site to switch: make it by transform, and look at its plan for the reasons"
            )
        targets = phases_in(setting, sites)
        changing = [name for name, phase in targets.items() if sites[name][0].phase != int(phase)]
        groups = site_groups(changed.root, changing)
        for group in groups:
            _check_phases(group, targets)
        if changing and changed.optimizers and not changed.averages:
            warn_of_left_out(changed.root)
        for each in changed.optimizers:
            note_steps(each)
    agree_on(processes, {f"what {name} is to become": (targets.get(name), name in changing, carry) for name in sites})
    agree_on_origin(processes, changed.root)
    if not changing:
        return Transition(())
    moves = [Move(group, targets[group.name], group.owner.rank) for group in groups]
    return switch(changed, moves, carry, split, then)


def _checked(
    net: nn.Module,
    optimizer: Optimizers | None,
    averages: object,
    carry: Carry,
) -> Changed:
    """What a switch is to change, if it can."""
    checked_carry(carry)
    refuse_inference(TransitionError, "switch phases")
    refuse_wrapped(net)
    root = unwrap(net)
    wrappers = wrappers_of(net)
    for wrapper in wrappers:
        check_wrapper(wrapper)
    copies = averages_of(averages, root)
    shards = Shards([root, *copies])
    shards.settle()
    changed = Changed(root, optimizers_in(optimizer), copies, wrappers, shards)
    refuse_untrained(switched_modules(root), changed.optimizers)
    return changed


def _check_phases(group: SiteGroup, targets: Mapping[str, Phase]) -> None:
    """Raises TransitionError for phases that sites which share a factor cannot have."""
    if len({targets.get(module.site, Phase(module.phase)) for module in group.firsts}) > 1:
        raise TransitionError(f"{', '.join(group.names)} share a factor: give them one phase")
    if group.shared and targets[group.name] is Phase.ADAPTOR:
        raise TransitionError(
            f"{', '.join(group.names)} share a factor, which takes the place of their input and leaves none for "
            "the base of an ADAPTOR: transform without share_inputs, or give them another phase"
        )


def replan_(
    net: nn.Module,
    plan: Plan,
    optimizer: Optimizers | None = None,
    *,
    averages: object = (),
    carry: Carry = Carry.MOVE,
) -> Transition:
    """Give the sites of a net other ranks.

    A site in FULL only notes its rank, one in LOW is cut anew from its product, one in ADAPTOR takes its branch into
    the base and starts another.

    Args:
        net: What ``transform`` made.
        plan: The net's plan with other ranks; see ``reranked`` and ``Plan.with_ranks``.
        optimizer: The optimizer over the net's parameters, if there is one, or all of them.
        averages: What averages the net's weights, as for ``enter_``.
        carry: What to do with the optimizer's state; see ``Carry``.

    Returns:
        What became of each site whose parameters changed.

    Raises:
        PlanError: Where the new plan has other sites or layouts.
        TransitionError: As ``enter_`` does.
    """
    processes = processes_training(net)
    with processes.all_or_none(TransitionError, "the change of ranks"):
        changed = _checked(net, optimizer, averages, carry)
        root, copies = changed.root, changed.averages
        old, sites = plan_of(root), switched_modules(root)
        same = [[(row.site.name, row.layout, row.sharing) for row in each.sites] for each in (checked_plan(plan), old)]
        if same[0] != same[1]:
            raise PlanError(
                "the new plan has other sites, layouts or shared factors than the net; only ranks can change"
            )
        ranks = {row.site.name: row.rank for row in plan.sites}
        moves = [
            Move(group, phase, ranks[group.name])
            for group in site_groups(root, [name for name, modules in sites.items() if modules[0].rank != ranks[name]])
            if group.owner.phase != int(Phase.FULL)
            for phase in (Phase.FULL, Phase(group.owner.phase))
        ]
        for each in changed.optimizers:
            note_steps(each)
    agree_on(processes, {f"the rank that {name} is to have": (rank, carry) for name, rank in ranks.items()})
    agree_on_origin(processes, root)
    transition = switch(changed, moves, carry) if moves else Transition(())
    for own in (sites, *(sites_of_average(copy, root) for copy in copies)):
        for name, modules in own.items():
            for module in modules:
                module.rank = ranks[name]
    set_plan(root, plan)
    specialize_(root)
    for copy in copies:
        for part in copy.modules():
            if is_captured(part) and "dynrank" in meta_of(part):
                set_plan(part, plan)
        specialize_(copy)
    return replace(transition, model=net)


def phases_of(net: nn.Module) -> dict[str, Phase]:
    """The phase that every site is in.

    Args:
        net: What ``transform`` made.

    Returns:
        The phases by site name.
    """
    return {name: Phase(modules[0].phase) for name, modules in switched_modules(unwrap(net)).items()}
