"""The only weight moves: phase changes site by site, with the optimizer's state, undone as a whole if one fails."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from . import optim
from .errors import PlanError, TransitionError
from .layout import Factors
from .lowrank import full_precision
from .net import unwrap
from .optim import Carry, State
from .overrides import fits
from .parameters import Journal, parameters_of, refuse_parameter, replace_parameters
from .phase import Phase, Setting
from .plan import Plan
from .rewrite import plan_of, set_plan, specialize_
from .switched import Switched, switched_modules


@dataclass(frozen=True)
class SiteChange:
    """What happened to one site. error: ‖W_new − W_old‖_F / ‖W_old‖_F of the weight the site stands for."""

    site: str
    before: Phase
    after: Phase
    replaced: tuple[str, ...]
    by: tuple[str, ...]
    error: float


@dataclass(frozen=True)
class Transition:
    """One phase change over all sites; empty where every site was in its phase already. carry: None without an
    optimizer.
    """

    changes: tuple[SiteChange, ...]
    carry: Carry | None = None

    def __bool__(self) -> bool:
        return bool(self.changes)


def enter_(
    net: nn.Module, setting: Setting, optimizer: Optimizer | None = None, *, carry: Carry = Carry.MOVE
) -> Transition:
    """Bring every site into its phase, replacing parameters in the net and in the optimizer, with its state.

    setting: a phase for all sites, or a mapping of site names (or shell patterns) to phases, others keeping theirs.
    Sites change one by one, the old parameters being freed before the next site is touched; what they held waits in a
    temporary file, so that any failure, interruption included, puts net and optimizer back as they were.

    Raises TransitionError in words for a pattern that matches nothing, non-finite weights, pending gradients, sharded
    or wrapped parameters, and an optimizer that holds none of the net's parameters. Warns (DynrankWarning) where
    state was reset.
    """
    root = unwrap(net)
    _refuse_wrapped(root)
    sites = switched_modules(root)
    targets = _targets(sites, setting)
    changing = {name: sites[name] for name, phase in targets.items() if sites[name][0].phase != int(phase)}
    if not changing:
        return Transition(())
    units = _units(sites, changing)
    for unit in units:
        together = [modules[0].site for modules in unit]
        if len({targets.get(name, Phase(sites[name][0].phase)) for name in together}) > 1:
            raise TransitionError(f"{', '.join(together)} share a factor: give them one phase")
        if len(unit) > 1 and targets[together[0]] is Phase.ADAPTOR:
            raise TransitionError(
                f"{', '.join(together)} share a factor, which takes the place of their input and leaves none for the "
                "base of an ADAPTOR: transform without share_inputs, or give them another phase"
            )
    moves = [_Move(unit, targets[unit[0][0].site], unit[0][0].rank) for unit in units]
    return _switch(root, moves, optimizer, carry)


def replan_(net: nn.Module, plan: Plan, optimizer: Optimizer | None = None, *, carry: Carry = Carry.MOVE) -> Transition:
    """Replace the plan by one with other ranks: a FULL site only notes its rank, a LOW one is cut anew from its
    product, an ADAPTOR takes its branch into the base and starts another.

    Raises PlanError where the new plan has other sites or layouts, TransitionError as ``enter_`` does.
    """
    root = unwrap(net)
    _refuse_wrapped(root)
    old, sites = plan_of(root), switched_modules(root)
    same = [[(row.site.name, row.layout, row.pack) for row in each.sites] for each in (plan, old)]
    if same[0] != same[1]:
        raise PlanError("the new plan has other sites, layouts or packs than the net; only ranks can change")
    ranks = {row.site.name: row.rank for row in plan.sites}
    changed = [name for name, modules in sites.items() if modules[0].rank != ranks[name]]
    moves = [
        _Move(unit, phase, ranks[unit[0][0].site])
        for unit in _units(sites, changed)
        if unit[0][0].phase != int(Phase.FULL)
        for phase in (Phase.FULL, Phase(unit[0][0].phase))
    ]
    transition = _switch(root, moves, optimizer, carry) if moves else Transition(())
    for row in plan.sites:
        for module in sites[row.site.name]:
            module.rank = row.rank
    set_plan(root, plan)
    specialize_(root)
    return transition


@torch.no_grad()
def randomize_(net: nn.Module) -> None:
    """Give the factors of every site in LOW random values in place of those they have: low rank from random init.

    Entries are normal, of one variance in all factors, with which the product's norm is expected to be what it was: for
    two, (‖W‖_F² / (m n r))^¼ as standard deviation. Raises TransitionError where no site is in LOW.
    """
    sites = [modules[0] for modules in switched_modules(unwrap(net)).values() if modules[0].phase == int(Phase.LOW)]
    if not sites:
        raise TransitionError(
            "no site is in LOW, so that there are no factors to randomize: enter_(net, Phase.LOW) first"
        )
    norms = [site.weight.square().sum() for site in sites]
    for site, norm in zip(sites, norms, strict=True):
        terms, count = site.layout.terms(site.shape, site.rank), len(site.factors)
        deviation = float(norm / (math.prod(site.shape) * terms)) ** (0.5 / count)
        for factor in site.factors if not site.owner else site.factors[:1]:
            factor.normal_(0.0, deviation)


def phases_of(net: nn.Module) -> dict[str, Phase]:
    """The phase of every site, by name."""
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


def _phase(value: object) -> Phase:
    try:
        return Phase(value)  # type: ignore[arg-type]
    except ValueError as error:
        raise TransitionError(f"{value!r} is no phase: give Phase.LOW, Phase.FULL or Phase.ADAPTOR") from error


def _targets(sites: Mapping[str, list[Switched]], setting: Setting) -> dict[str, Phase]:
    if not sites:
        raise TransitionError(
            "the net has no site to switch: make it by transform, and look at its plan for the reasons"
        )
    if not isinstance(setting, Mapping):
        return dict.fromkeys(sites, _phase(setting))
    targets: dict[str, Phase] = {}
    for pattern, phase in setting.items():
        names = [name for name in sites if name == pattern or fits(name, pattern)]
        if not names:
            raise TransitionError(f"the pattern {pattern!r} matches no site; they are named like {next(iter(sites))}")
        targets.update(dict.fromkeys(names, _phase(phase)))
    return targets


def _check(sites: Mapping[str, list[Switched]], optimizer: Optimizer | None) -> None:
    """Everything that can be wrong with values, before anything is touched."""
    present = []
    for name, modules in sites.items():
        for parameter in parameters_of(modules[0]):
            refuse_parameter(name, parameter)
            present.append(parameter)
            if not bool(torch.isfinite(parameter).all()):
                raise TransitionError(
                    f"{name} has non-finite weights: nothing was switched; look for a diverged step, and lower "
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
    """One site, or a pack of them, each with all its modules, to be brought into a phase, with a rank from then on."""

    sites: list[list[Switched]]
    phase: Phase
    rank: int


def _units(sites: Mapping[str, list[Switched]], changing: Iterable[str]) -> list[list[list[Switched]]]:
    """The sites that change, those of a pack together, the owner of the shared factor first."""
    units = dict.fromkeys(sites[name][0].pack or (name,) for name in changing)
    return [[sites[name] for name in unit] for unit in units]


def _switch(root: nn.Module, moves: Sequence[_Move], optimizer: Optimizer | None, carry: Carry) -> Transition:
    """All moves, in order, or none of them."""
    _check({modules[0].site: modules for move in moves for modules in move.sites}, optimizer)
    if optimizer is not None and carry is Carry.MOVE and not optim.can_move(optimizer):
        carry = Carry.RESET
        optim.warn_reset(optimizer)
    changes = []
    with Journal(optimizer) as journal:
        for move in moves:
            try:
                with full_precision():
                    changes += _change_sites(move, optimizer, carry, journal)
            except OSError as error:
                raise TransitionError(
                    f"no room to keep {move.sites[0][0].site} safe during its switch ({error}); "
                    "net and optimizer are as before"
                ) from error
    specialize_(root)
    return Transition(tuple(changes), carry if optimizer is not None else None)


@torch.no_grad()
def _change_sites(move: _Move, optimizer: Optimizer | None, carry: Carry, journal: Journal) -> list[SiteChange]:
    firsts, phase = [modules[0] for modules in move.sites], move.phase
    name, layout = firsts[0].site, firsts[0].layout
    adaptor = Phase.ADAPTOR in (phase, Phase(firsts[0].phase))
    # A branch that starts at zero has no moments to take over, and its own say little of the weight that it ends in.
    carrying = optimizer if carry is Carry.MOVE and not adaptor else None
    old_weights = [module.weight.detach() for module in firsts]
    base = old_weights[0] if phase is Phase.ADAPTOR else None
    new: list[list[_Value]]
    if phase is Phase.ADAPTOR:
        new = [[(value, {}) for value in _branch(firsts[0], move.rank, old_weights[0])]]
        new_weights = old_weights
    elif phase is Phase.LOW:
        new = _factors(firsts, old_weights, move.rank, carrying)
        others = [value for value, _ in new[0][1:]]
        new_weights = [layout.join((values[0][0], *others)) for values in new]
    else:
        new = _dense(firsts, old_weights, carrying)
        new_weights = old_weights
    if not all(bool(torch.isfinite(value).all()) for values in new for value, _ in values):
        raise TransitionError(f"{name} could not be split into finite factors; net and optimizer are as before")
    changes = []
    for modules, values, old_weight, new_weight in zip(move.sites, new, old_weights, new_weights, strict=True):
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


_Value: TypeAlias = tuple[Tensor, State]


def _factors(
    firsts: list[Switched], weights: list[Tensor], rank: int, optimizer: Optimizer | None
) -> list[list[_Value]]:
    """Per site the values of its new parameters with their optimizer states: all factors, and (left,) of those that
    share the first one's right.
    """
    layout, sizes = firsts[0].layout, [weight.shape[0] for weight in weights]
    factors = layout.split(torch.cat(weights) if len(weights) > 1 else weights[0], rank)
    states: list[State] = [{} for _ in factors]
    if optimizer is not None:
        states = optim.moved_to_factors(optimizer, [parameters_of(m)[0] for m in firsts], factors, layout)
    left, *others = factors
    lefts = left.split(sizes) if len(sizes) > 1 else [left]
    new = [[value] for value in zip(lefts, optim.unstacked_state(states[0], sizes), strict=True)]
    new[0] += zip(others, states[1:], strict=True)
    return new


def _dense(firsts: list[Switched], weights: list[Tensor], optimizer: Optimizer | None) -> list[list[_Value]]:
    """Per site the value of its dense weight with its optimizer state."""
    sizes, states = [weight.shape[0] for weight in weights], [State() for _ in weights]
    if optimizer is not None:
        lefts, right = [module.factors[0] for module in firsts], firsts[0].factors[1]
        stacked = torch.cat(weights) if len(weights) > 1 else weights[0]
        (state,) = optim.moved_to_dense(optimizer, lefts, right, stacked, firsts[0].layout)
        states = optim.unstacked_state(state, sizes)
    return [[value] for value in zip(weights, states, strict=True)]


def _branch(module: Switched, rank: int, like: Tensor) -> Factors:
    """Factors whose product is zero: that applied last is, the others are random as torch initialises a layer."""
    shapes, last = module.layout.factor_shapes(module.shape, rank), module.layout.stages(module.ops[0])[-1][1]
    factors = tuple(like.new_zeros(shape) for shape in shapes)
    for index, factor in enumerate(factors):
        if index != last:
            torch.nn.init.kaiming_uniform_(factor, a=5**0.5)
    return factors


def in_format_of(value: Tensor, old: Sequence[Parameter]) -> Tensor:
    """In the memory format of the parameters it replaces (channels_last stays so)."""
    last = torch.channels_last
    if value.ndim == 4 and any(not p.is_contiguous() and p.is_contiguous(memory_format=last) for p in old):
        return value.contiguous(memory_format=last)
    return value.contiguous()
