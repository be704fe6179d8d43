"""The only weight moves: phase changes site by site, with the optimizer's state, undone as a whole if one fails."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from ..errors import PlanError, TransitionError
from ..files import why
from ..layouts import full_precision
from ..phase import ALPHA, Phase
from ..plan import Plan, checked_plan
from ..rewrite import (
    SiteGroup,
    Switched,
    in_format_of,
    plan_of,
    set_plan,
    site_groups,
    specialize_,
    switched_modules,
)
from ..schedules import Setting
from ..tracing import is_captured, meta_of, unwrap
from .averages import averages_of, near, sites_of_average
from .carry import Carry, can_move, checked_carry, warn_reset
from .gradients import all_finite, at_factors, note_steps, pending_gradient
from .groups import Optimizers, holder_of, optimizers_in
from .init import branch
from .replace import Journal, parameters_of, refuse_sharded, replace_parameters
from .setting import phases_in
from .values import Split, Value, dense_of, factors_of


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
        carry: What was done with the optimizer's state: RESET where that of any of several was; None without one.
    """

    changes: tuple[SiteChange, ...]
    carry: Carry | None = None

    def __bool__(self) -> bool:
        return bool(self.changes)


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
    optimizers, copies = optimizers_in(optimizer), averages_of(averages, root)
    _refuse_untrained(sites, optimizers)
    for each in optimizers:
        note_steps(each)
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
    return _switch(root, moves, optimizers, copies, carry, split)


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
    checked_carry(carry)
    root = unwrap(net)
    _refuse_wrapped(root)
    old, sites = plan_of(root), switched_modules(root)
    same = [[(row.site.name, row.layout, row.sharing) for row in each.sites] for each in (checked_plan(plan), old)]
    if same[0] != same[1]:
        raise PlanError("the new plan has other sites, layouts or shared factors than the net; only ranks can change")
    optimizers, copies = optimizers_in(optimizer), averages_of(averages, root)
    _refuse_untrained(sites, optimizers)
    for each in optimizers:
        note_steps(each)
    ranks = {row.site.name: row.rank for row in plan.sites}
    changed = [name for name, modules in sites.items() if modules[0].rank != ranks[name]]
    moves = [
        _Move(group, phase, ranks[group.name])
        for group in site_groups(root, changed)
        if group.owner.phase != int(Phase.FULL)
        for phase in (Phase.FULL, Phase(group.owner.phase))
    ]
    transition = _switch(root, moves, optimizers, copies, carry) if moves else Transition(())
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


def _refuse_untrained(sites: Mapping[str, Sequence[Switched]], optimizers: Sequence[Optimizer]) -> None:
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


def _check(root: nn.Module, groups: Iterable[SiteGroup], optimizers: Sequence[Optimizer]) -> None:
    """Everything that can be wrong with values, before anything is touched."""
    lost = []
    for group in groups:
        present = [(module, p) for module in group.firsts for p in parameters_of(module)]
        optimizer = holder_of(optimizers, [p for _, p in present])
        for module, parameter in present:
            refuse_sharded(module.site, parameter)
            if not bool(torch.isfinite(parameter).all()):
                raise TransitionError(
                    f"{module.site} has non-finite weights: nothing was switched; look for a diverged step, and lower "
                    f"the learning rate"
                )
            if holder_of(optimizers, [parameter]) not in (optimizer, None):
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


# The switch


@dataclass(frozen=True)
class _Move:
    """A group to be brought into a phase, with a rank from then on."""

    group: SiteGroup
    phase: Phase
    rank: int


def _switch(
    root: nn.Module,
    moves: Sequence[_Move],
    optimizers: Sequence[Optimizer],
    averages: Sequence[nn.Module],
    carry: Carry,
    split: Split | None = None,
) -> Transition:
    """All moves, in order, or none of them."""
    copies = [sites_of_average(average, root) for average in averages]
    # A group may move twice, by way of FULL.
    _check(root, {move.group.name: move.group for move in moves}.values(), optimizers)
    for copy in copies:
        _check(root, [_averaged(move.group, copy) for move in moves], ())
    movable, carry = _movable(moves, optimizers, carry)
    changes = []
    with Journal() as journal:
        for move in moves:
            optimizer = holder_of(optimizers, [p for module in move.group.firsts for p in parameters_of(module)])
            try:
                with full_precision():
                    changes += _change_sites(move, optimizer, optimizer in movable, copies, journal, split)
            except OSError as error:
                raise TransitionError(
                    f"no room to keep {move.group.name} safe during its switch ({why(error)}); "
                    "net and optimizer are as before"
                ) from error
    for net in (root, *averages):
        specialize_(net)
    return Transition(tuple(changes), carry if optimizers else None)


def _movable(moves: Sequence[_Move], optimizers: Sequence[Optimizer], carry: Carry) -> tuple[list[Optimizer], Carry]:
    """The optimizers whose state goes along, and what is to be said of it."""
    trained = [p for move in moves for module in move.group.firsts for p in parameters_of(module)]
    training = [each for each in optimizers if holder_of([each], trained) is not None]
    if carry is not Carry.MOVE:
        return [], carry
    movable = [each for each in training if can_move(each, trained)]
    for each in training:
        if each not in movable:
            warn_reset(each)
            carry = Carry.RESET
    return movable, carry


def _averaged(group: SiteGroup, copy: Mapping[str, Sequence[Switched]]) -> SiteGroup:
    """The same sites of an average."""
    return SiteGroup(tuple(tuple(copy[name]) for name in group.names))


@torch.no_grad()
def _change_sites(
    move: _Move,
    optimizer: Optimizer | None,
    movable: bool,
    copies: Sequence[Mapping[str, Sequence[Switched]]],
    journal: Journal,
    split: Split | None,
) -> list[SiteChange]:
    group, phase = move.group, move.phase
    firsts, owner, layout = group.firsts, group.owner, group.layout
    adaptor = Phase.ADAPTOR in (phase, Phase(owner.phase))
    # A branch that starts at zero has no moments to take over, and its own say little of the weight that it ends in.
    carrying = optimizer if movable and not adaptor else None
    old_weights = [module.weight.detach() for module in firsts]
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
    for copy in copies:
        _change_average(move, _averaged(group, copy), [[value for value, _ in values] for values in new], journal)
    gradients = _gradients(move, optimizer, new, old_weights)
    changes = []
    for modules, values, grads, old_weight, new_weight in zip(
        group.sites, new, gradients, old_weights, new_weights, strict=True
    ):
        module, before, replaced = modules[0], Phase(modules[0].phase), modules[0].parameter_names
        lost = torch.linalg.vector_norm((new_weight - old_weight).float())
        error = float(lost / torch.linalg.vector_norm(old_weight.float()).clamp_min(1e-30))
        names = _put(modules, move, values, grads, old_weight, optimizer, journal)
        changes.append(SiteChange(module.site, before, phase, replaced, names, error))
    return changes


def _change_average(move: _Move, group: SiteGroup, new: list[list[Tensor]], journal: Journal) -> None:
    """The sites of an average, beside those of the net, of which ``new`` holds the values."""
    weights = [module.weight.detach() for module in group.firsts]
    values = [[weight] for weight in weights]
    if move.phase is Phase.ADAPTOR:
        values = [[value.to(weights[0]) for value in new[0]]]
    elif move.phase is Phase.LOW:
        lefts, others = [each[0] for each in new], new[0][1:]
        stacked = [torch.cat(each) if group.shared else each[0] for each in (lefts, weights)]
        left, *rest = near(group.layout, (stacked[0], *others), stacked[1])
        values = [[each] for each in left.split([weight.shape[0] for weight in weights])]
        values[0] += rest
    for modules, values_of_site, weight in zip(group.sites, values, weights, strict=True):
        none = [None] * len(values_of_site)
        _put(modules, move, [(value, {}) for value in values_of_site], none, weight, None, journal)


def _put(
    modules: Sequence[Switched],
    move: _Move,
    values: Sequence[Value],
    gradients: Sequence[Tensor | None],
    weight: Tensor,
    optimizer: Optimizer | None,
    journal: Journal,
) -> tuple[str, ...]:
    """New parameters for one site, all of whose modules are given; their names. weight: what the site stood for."""
    old, names = parameters_of(modules[0]), modules[0].names_in(move.phase)
    base = in_format_of(weight, old) if move.phase is Phase.ADAPTOR else None
    parameters = [Parameter(in_format_of(value, old), requires_grad=old[0].requires_grad) for value, _ in values]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = None if gradient is None else in_format_of(gradient.to(parameter.dtype), [parameter])
    journal.keep(modules, old, optimizer, [pending_gradient(p, optimizer) for p in old])
    for module in modules:
        module.rank = move.rank
    new = dict(zip(names, parameters, strict=True))
    replace_parameters(modules, move.phase, new, optimizer, [state for _, state in values], base)
    return names


def _gradients(
    move: _Move, optimizer: Optimizer | None, new: Sequence[Sequence[Value]], weights: Sequence[Tensor]
) -> list[list[Tensor | None]]:
    """Per site the gradients of its new parameters: those that were pending, carried; see ``gradients``."""
    group = move.group
    pending = [[pending_gradient(p, optimizer) for p in parameters_of(module)] for module in group.firsts]
    if all(gradient is None for gradients in pending for gradient in gradients):
        return [[None] * len(values) for values in new]
    if group.owner.phase != int(Phase.FULL):
        return [[torch.full_like(value, torch.nan) for value, _ in values] for values in new]
    stacked = [values[0][0] for values in new]
    factors = (torch.cat(stacked) if group.shared else stacked[0], *(value for value, _ in new[0][1:]))
    scale = ALPHA / move.rank if move.phase is Phase.ADAPTOR else 1.0
    return at_factors(group.layout, factors, [gradient for (gradient,) in pending], weights, scale)
