"""The only weight moves: phase changes site by site, with the optimizer's state, undone as a whole if one fails."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import Parameter
from torch.optim import Optimizer

from ..errors import PlanError, TransitionError
from ..files import why
from ..layouts import full_precision
from ..phase import Phase
from ..plan import Plan, checked_plan
from ..rewrite import SiteGroup, Switched, plan_of, set_plan, site_groups, specialize_, switched_modules
from ..schedules import Setting
from ..tracing import unwrap
from .carry import Carry, can_move, checked_carry, warn_reset
from .init import branch
from .replace import Journal, parameters_of, refuse_parameter, replace_parameters
from .setting import phases_in
from .values import Split, Value, dense_of, factors_of, in_format_of


@dataclass(frozen=True)
class SiteChange:
    """What happened to one site.

    Attributes:
        site: The site's name.
        before: The phase it was in.
        after: The phase it is in now.
        replaced: The names of its parameters before: ``weight``, or those of the factors.
        by: The names of its parameters now.
        error: ‖W_new − W_old‖_F / ‖W_old‖_F of the weight that the site stands for.
    """

    site: str
    before: Phase
    after: Phase
    replaced: tuple[str, ...]
    by: tuple[str, ...]
    error: float


@dataclass(frozen=True)
class Transition:
    """What one phase change did; false where every site was in its phase already.

    Attributes:
        changes: What happened to each site that changed, in order.
        carry: What was done with the optimizer's state; None without an optimizer.
    """

    changes: tuple[SiteChange, ...]
    carry: Carry | None = None

    def __bool__(self) -> bool:
        return bool(self.changes)


def enter_(
    net: nn.Module,
    setting: Setting,
    optimizer: Optimizer | None = None,
    *,
    carry: Carry = Carry.MOVE,
    split: Split | None = None,
) -> Transition:
    """Bring every site into its phase, replacing parameters in the net and in the optimizer, whose state goes along.

    Sites change one by one, the old parameters being freed before the next site is touched; what they held waits in a
    temporary file, so that any failure, interruption included, puts net and optimizer back as they were.

    Args:
        net: What ``transform`` made, possibly within ``torch.compile``.
        setting: A phase for all sites, or a mapping of site names (or shell patterns) to phases; sites that it does not
            name keep theirs.
        optimizer: The optimizer over the net's parameters, if there is one.
        carry: What to do with its state; see ``Carry``.
        split: How the factors of sites that enter LOW are found (``Calibration.split``); by default the truncated SVD
            of the weight.

    Returns:
        What became of each site that changed.

    Raises:
        TransitionError: For a pattern that matches nothing, non-finite weights, pending gradients, sharded or wrapped
            parameters, and an optimizer that holds none of the net's parameters. Nothing has been changed then.

    Warns:
        DynrankWarning: Where the optimizer's state was reset since it could not be moved.
    """
    checked_carry(carry)
    root = unwrap(net)
    _refuse_wrapped(root)
    sites = switched_modules(root)
    if not sites:
        raise TransitionError(
            "the net has no site to switch: make it by transform, and look at its plan for the reasons"
        )
    targets = phases_in(setting, sites)
    changing = [name for name, phase in targets.items() if sites[name][0].phase != int(phase)]
    if not changing:
        return Transition(())
    groups = site_groups(root, changing)
    for group in groups:
        if len({targets.get(module.site, Phase(module.phase)) for module in group.firsts}) > 1:
            raise TransitionError(f"{', '.join(group.names)} share a factor: give them one phase")
        if group.shared and targets[group.name] is Phase.ADAPTOR:
            raise TransitionError(
                f"{', '.join(group.names)} share a factor, which takes the place of their input and leaves none for "
                "the base of an ADAPTOR: transform without share_inputs, or give them another phase"
            )
    moves = [_Move(group, targets[group.name], group.owner.rank) for group in groups]
    return _switch(root, moves, optimizer, carry, split)


def replan_(net: nn.Module, plan: Plan, optimizer: Optimizer | None = None, *, carry: Carry = Carry.MOVE) -> Transition:
    """Give the sites of a net other ranks.

    A site in FULL only notes its rank, one in LOW is cut anew from its product, one in ADAPTOR takes its branch into
    the base and starts another.

    Args:
        net: What ``transform`` made.
        plan: The net's plan with other ranks; see ``reranked`` and ``Plan.with_ranks``.
        optimizer: The optimizer over the net's parameters, if there is one.
        carry: What to do with its state; see ``Carry``.

    Returns:
        What became of each site whose parameters changed.

    Raises:
        PlanError: Where the new plan has other sites or layouts.
        TransitionError: As ``enter_`` does.
    """
    checked_carry(carry)
    root = unwrap(net)
    _refuse_wrapped(root)
    old, sites = plan_of(root), switched_modules(root)
    same = [[(row.site.name, row.layout, row.sharing) for row in each.sites] for each in (checked_plan(plan), old)]
    if same[0] != same[1]:
        raise PlanError("the new plan has other sites, layouts or shared factors than the net; only ranks can change")
    ranks = {row.site.name: row.rank for row in plan.sites}
    changed = [name for name, modules in sites.items() if modules[0].rank != ranks[name]]
    moves = [
        _Move(group, phase, ranks[group.name])
        for group in site_groups(root, changed)
        if group.owner.phase != int(Phase.FULL)
        for phase in (Phase.FULL, Phase(group.owner.phase))
    ]
    transition = _switch(root, moves, optimizer, carry) if moves else Transition(())
    for row in plan.sites:
        for module in sites[row.site.name]:
            module.rank = row.rank
    set_plan(root, plan)
    specialize_(root)
    return transition


def phases_of(net: nn.Module) -> dict[str, Phase]:
    """The phase that every site is in.

    Args:
        net: What ``transform`` made.

    Returns:
        The phases by site name.
    """
    return {name: Phase(modules[0].phase) for name, modules in switched_modules(unwrap(net)).items()}


# Refusals


def _refuse_wrapped(root: nn.Module) -> None:
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


def _check(modules: Iterable[Switched], optimizer: Optimizer | None) -> None:
    """Everything that can be wrong with values, before anything is touched."""
    present = []
    for module in modules:
        for parameter in parameters_of(module):
            refuse_parameter(module.site, parameter)
            present.append(parameter)
            if not bool(torch.isfinite(parameter).all()):
                raise TransitionError(
                    f"{module.site} has non-finite weights: nothing was switched; look for a diverged step, and lower "
                    f"the learning rate"
                )
    if optimizer is None:
        return
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TransitionError("LBFGS keeps one history over all parameters: switch without it, then make a new LBFGS")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if any(p.requires_grad for p in present) and not any(id(p) in held for p in present):
        raise TransitionError(
            "the optimizer holds no parameter of the sites to switch: build it over the transformed net's parameters()"
        )


# The switch


@dataclass(frozen=True)
class _Move:
    """A group to be brought into a phase, with a rank from then on."""

    group: SiteGroup
    phase: Phase
    rank: int


def _switch(
    root: nn.Module, moves: Sequence[_Move], optimizer: Optimizer | None, carry: Carry, split: Split | None = None
) -> Transition:
    """All moves, in order, or none of them."""
    # A group may move twice, by way of FULL.
    _check({module.site: module for move in moves for module in move.group.firsts}.values(), optimizer)
    if optimizer is not None and carry is Carry.MOVE and not can_move(optimizer):
        carry = Carry.RESET
        warn_reset(optimizer)
    changes = []
    with Journal(optimizer) as journal:
        for move in moves:
            try:
                with full_precision():
                    changes += _change_sites(move, optimizer, carry, journal, split)
            except OSError as error:
                raise TransitionError(
                    f"no room to keep {move.group.name} safe during its switch ({why(error)}); "
                    "net and optimizer are as before"
                ) from error
    specialize_(root)
    return Transition(tuple(changes), carry if optimizer is not None else None)


@torch.no_grad()
def _change_sites(
    move: _Move, optimizer: Optimizer | None, carry: Carry, journal: Journal, split: Split | None
) -> list[SiteChange]:
    group, phase = move.group, move.phase
    firsts, owner, layout = group.firsts, group.owner, group.layout
    adaptor = Phase.ADAPTOR in (phase, Phase(owner.phase))
    # A branch that starts at zero has no moments to take over, and its own say little of the weight that it ends in.
    carrying = optimizer if carry is Carry.MOVE and not adaptor else None
    old_weights = [module.weight.detach() for module in firsts]
    base = in_format_of(old_weights[0], parameters_of(firsts[0])) if phase is Phase.ADAPTOR else None
    new: list[list[Value]]
    if phase is Phase.ADAPTOR:
        new = [[(value, {}) for value in branch(owner, move.rank, old_weights[0])]]
        new_weights = old_weights
    elif phase is Phase.LOW:
        new = factors_of(firsts, old_weights, move.rank, carrying, split)
        others = [value for value, _ in new[0][1:]]
        new_weights = [layout.join((values[0][0], *others)) for values in new]
    else:
        new = dense_of(firsts, old_weights, carrying)
        new_weights = old_weights
    if not all(bool(torch.isfinite(value).all()) for values in new for value, _ in values):
        raise TransitionError(f"{group.name} could not be split into finite factors; net and optimizer are as before")
    changes = []
    for modules, values, old_weight, new_weight in zip(group.sites, new, old_weights, new_weights, strict=True):
        module, before, replaced = modules[0], Phase(modules[0].phase), modules[0].parameter_names
        lost = torch.linalg.vector_norm((new_weight - old_weight).float())
        error = float(lost / torch.linalg.vector_norm(old_weight.float()).clamp_min(1e-30))
        old, names = parameters_of(module), module.names_in(phase)
        parameters = [Parameter(in_format_of(value, old), requires_grad=old[0].requires_grad) for value, _ in values]
        journal.keep(modules, old)
        for each in modules:
            each.rank = move.rank
        new_parameters = dict(zip(names, parameters, strict=True))
        replace_parameters(modules, phase, new_parameters, optimizer, [state for _, state in values], base)
        changes.append(SiteChange(module.site, before, phase, replaced, names, error))
    return changes
