"""The only weight moves: site by site, the old parameters freed before the next site is touched, all or none.

Of several processes one computes what the sites of a group become, in turns, and sends it to the others before anything
moves: singular vectors have no sign of their own, and processes that found other ones would train other nets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ..errors import TransitionError
from ..files import why
from ..layouts import full_precision
from ..phase import ALPHA, Phase
from ..processes import Processes, Shards, ignored_by, is_part, let_go, part_as, processes_of
from ..rewrite import SiteGroup, Switched, in_format_of, specialize_
from .agreement import agree_after, agree_before
from .averages import near, sites_of_average
from .carry import Carry, can_move, warn_reset
from .gradients import all_finite, at_factors, pending_gradient, waiting_gradient
from .groups import holder_in, holders_of, in_slots
from .init import branch
from .refusals import check_held, check_values
from .replace import Journal, parameters_of, replace_parameters
from .rows import error_of
from .sharding import in_hand, in_parts, in_rows, pending_in_parts, put_down, rows_of
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
        model: What was given, a wrapper such as ``DistributedDataParallel`` included: it is what to go on with, since
            none has to be made anew.
    """

    changes: tuple[SiteChange, ...]
    carry: Carry | None = None
    model: nn.Module | None = field(default=None, repr=False, compare=False)

    def __bool__(self) -> bool:
        return bool(self.changes)


@dataclass(frozen=True)
class Move:
    """A group to be brought into a phase, with a rank from then on."""

    group: SiteGroup
    phase: Phase
    rank: int


@dataclass(frozen=True)
class Changed:
    """What a switch changes, in all processes that train it.

    Attributes:
        root: The net.
        optimizers: All that train it.
        averages: The modules that hold averages of its weights.
        wrappers: The DDP objects that hold it.
        shards: What FSDP2 holds of it, and of the averages.
    """

    root: nn.Module
    optimizers: Sequence[Optimizer] = ()
    averages: Sequence[nn.Module] = ()
    wrappers: Sequence[DistributedDataParallel] = ()
    shards: Shards = field(default_factory=lambda: Shards(()))

    @property
    def processes(self) -> Processes:
        """Those that train the net."""
        return self.shards.processes if self.shards else processes_of(self.wrappers)


def switch(
    changed: Changed,
    moves: Sequence[Move],
    carry: Carry,
    split: Split | None = None,
    then: Callable[[], object] | None = None,
) -> Transition:
    """All moves, in order, or none of them; in all processes, or in none.

    then: what is called before they are good for ever; where it raises, all is as before.
    """
    root, optimizers, averages = changed.root, changed.optimizers, changed.averages
    processes, groups = changed.processes, list({move.group.name: move.group for move in moves}.values())
    ignored, shards = ignored_by(changed.wrappers), changed.shards
    finite = _finite(changed)
    with processes.all_or_none(TransitionError, "the switch"):
        copies = [sites_of_average(average, root) for average in averages]
        # A group may move twice, by way of FULL.
        check_values(groups, optimizers, carry, shards=shards, finite=finite)
        check_held(groups, ignored)
        for copy in copies:
            check_values([_averaged(move.group, copy) for move in moves], (), shards=shards, finite=finite)
        holders = holders_of(optimizers)
        training = {move.group.name: holder_in(holders, _trained(move)) for move in moves}
        movable, carry = _movable(moves, [each for each in optimizers if each in training.values()], carry)
    agree_before(processes, root, optimizers, ignored)
    pending = pending_in_parts(processes, groups, training)
    changes = []
    copied = [part for copy in averages for part in copy.modules() if isinstance(part, DistributedDataParallel)]
    with let_go([*changed.wrappers, *copied]) as make_again, in_slots(optimizers), Journal(shards) as journal:
        carried = [each if (each := training[move.group.name]) in movable else None for move in moves]
        makes = [
            partial(_made, move, carrying, copies, split, in_parts(move.group))
            for move, carrying in zip(moves, carried, strict=True)
        ]
        ready = iter(makes) if shards else _side_by_side(makes, moves, processes)
        for turn, made in enumerate(ready):
            move, carrying, source = moves[turn], carried[turn], turn % processes.count
            optimizer, what = training[move.group.name], f"the switch of {move.group.name}"
            by_rows = not copies and split is None and rows_of(move.group, move.phase, carrying, pending)
            heard = processes.heard(TransitionError, what)
            with processes.all_or_none(TransitionError, what), _room_for(move.group):
                if by_rows:
                    with in_rows(move.group, carrying, heard, source):
                        news = [new._replace(rows=True) for new in made()]
                else:
                    held = [move.group, *(_averaged(move.group, copy) for copy in copies)]
                    with in_hand(held, carrying, pending, heard, source):
                        news = heard.from_one(source, made, TransitionError, what)
                changes += _install(move, news, optimizer, copies, journal)
        with processes.all_or_none(TransitionError, "making DistributedDataParallel anew"):
            make_again()
        agree_after(processes, groups, optimizers)
        if then is not None:
            then()
    for net in (root, *averages):
        specialize_(net)
    return Transition(tuple(changes), carry if optimizers else None)


def _side_by_side(
    makes: Sequence[Callable[[], list[_News]]], moves: Sequence[Move], processes: Processes
) -> Iterator[Callable[[], list[_News]]]:
    """What makes each move's news, in rounds: each process has computed its own of a round when the first is sent, so
    that all compute at once. Moves of one group wait for each other, since the second goes on from the first.
    """
    for start in range(0, len(moves), processes.count):
        turns, mine = range(len(moves))[start : start + processes.count], start + processes.rank
        apart = len({moves[turn].group.name for turn in turns}) == len(turns)
        done = _called(makes[mine]) if apart and mine in turns else None
        for turn in turns:
            yield done if done is not None and turn == mine else makes[turn]


def _called(make: Callable[[], list[_News]]) -> Callable[[], list[_News]]:
    """It has been called; what it gave, or raised, is kept until it is asked for."""
    kept: Future[list[_News]] = Future()
    try:
        kept.set_result(make())
    except BaseException as error:
        kept.set_exception(error)
    return kept.result


def _finite(changed: Changed) -> Callable[[], bool]:
    """What tells whether all gradients are finite: of a net in parts, in all processes, which have compared it then."""
    if not changed.shards:
        return partial(all_finite, changed.root, changed.optimizers)
    unsound = torch.tensor(int(not all_finite(changed.root, changed.optimizers)))
    changed.processes.sum_([unsound])
    return lambda: not int(unsound)


@contextmanager
def _room_for(group: SiteGroup) -> Iterator[None]:
    """Words for a disk without room for the journal."""
    try:
        yield
    except OSError as error:
        raise TransitionError(
            f"no room to keep {group.name} safe during its switch ({why(error)}); net and optimizer are as before"
        ) from error


def _trained(move: Move) -> list[Parameter]:
    return [p for module in move.group.firsts for p in parameters_of(module)]


def _movable(moves: Sequence[Move], training: Sequence[Optimizer], carry: Carry) -> tuple[list[Optimizer], Carry]:
    """The optimizers, of those that train what moves, whose state goes along, and what is to be said of it."""
    trained = [p for move in moves for p in _trained(move)]
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


class _News(NamedTuple):
    """What the sites of a group become, one entry each: what one process computes, and sends to the others.

    values: of the new parameters, with their optimizer states. bases: of an ADAPTOR. errors: of the weights.
    gradients: of the new parameters, where all processes have them together. rows: whether the first of the values are
    the rows of this process.
    """

    values: list[list[Value]]
    bases: list[Tensor | None]
    errors: list[float]
    gradients: list[list[Tensor | None]] | None = None
    rows: bool = False


@torch.no_grad()
def _made(
    move: Move,
    optimizer: Optimizer | None,
    copies: Sequence[Mapping[str, Sequence[Switched]]],
    split: Split | None,
    parts: bool,
) -> list[_News]:
    """For the net, and for each of its averages. optimizer: whose state goes along. parts: whether the sites are put
    together of parts, with their pending gradients.
    """
    group, phase = move.group, move.phase
    firsts, owner, layout = group.firsts, group.owner, group.layout
    # A branch that starts at zero has no moments to take over, and its own say little of the weight that it ends in.
    carrying = None if Phase.ADAPTOR in (phase, Phase(owner.phase)) else optimizer
    with full_precision():
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
        errors = [error_of(layout, now, old) for now, old in zip(new_weights, old_weights, strict=True)]
        if not all(bool(torch.isfinite(value).all()) for values in new for value, _ in values):
            raise TransitionError(
                f"{group.name} could not be split into finite factors; net and optimizer are as before"
            )
        values = [[value for value, _ in each] for each in new]
        averages = [_made_of_average(move, _averaged(group, copy), values) for copy in copies]
        gradients = _gradients(move, None, new) if parts else None
    return [_News(new, _bases(move, old_weights), errors, gradients), *averages]


def _bases(move: Move, weights: Sequence[Tensor]) -> list[Tensor | None]:
    return [weight if move.phase is Phase.ADAPTOR else None for weight in weights]


def _made_of_average(move: Move, group: SiteGroup, new: list[list[Tensor]]) -> _News:
    """For the sites of an average, beside those of the net, of which ``new`` holds the values."""
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
    return _News([[(value, {}) for value in each] for each in values], _bases(move, weights), [])


@torch.no_grad()
def _install(
    move: Move,
    news: Sequence[_News],
    optimizer: Optimizer | None,
    copies: Sequence[Mapping[str, Sequence[Switched]]],
    journal: Journal,
) -> list[SiteChange]:
    """Put what was made into its places, those of the averages first."""
    own, *of_averages = news
    for copy, new in zip(copies, of_averages, strict=True):
        for modules, values, base in zip(_averaged(move.group, copy).sites, new.values, new.bases, strict=True):
            _put(modules, move, values, [None] * len(values), base, None, journal, rows=False)
    gradients = _gradients(move, optimizer, own.values) if own.gradients is None else own.gradients
    changes = []
    for modules, values, grads, base, error in zip(
        move.group.sites, own.values, gradients, own.bases, own.errors, strict=True
    ):
        module, before, replaced = modules[0], Phase(modules[0].phase), modules[0].parameter_names
        names = _put(modules, move, values, grads, base, optimizer, journal, rows=own.rows)
        changes.append(SiteChange(module.site, before, move.phase, replaced, names, error))
    return changes


def _put(
    modules: Sequence[Switched],
    move: Move,
    values: Sequence[Value],
    gradients: Sequence[Tensor | None],
    base: Tensor | None,
    optimizer: Optimizer | None,
    journal: Journal,
    *,
    rows: bool,
) -> tuple[str, ...]:
    """New parameters for one site, all of whose modules are given; their names."""
    old, names = parameters_of(modules[0]), modules[0].names_in(move.phase)
    base = None if base is None else in_format_of(base, old)
    if is_part(old[0]):
        parameters, states = put_down(modules[0], names, values, old[0], journal.shards, rows=rows)
    else:
        parameters = [Parameter(in_format_of(value, old), requires_grad=old[0].requires_grad) for value, _ in values]
        states = [state for _, state in values]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            cut = part_as(gradient, parameter) if is_part(parameter) else in_format_of(gradient, [parameter])
            parameter.grad = cut.to(parameter.dtype)
    journal.keep(modules, old, optimizer, [waiting_gradient(p, optimizer) for p in old])
    for module in modules:
        module.rank = move.rank
    new = dict(zip(names, parameters, strict=True))
    replace_parameters(modules, move.phase, new, optimizer, states, base, journal.shards)
    return names


def _gradients(move: Move, optimizer: Optimizer | None, new: Sequence[Sequence[Value]]) -> list[list[Tensor | None]]:
    """Per site the gradients of its new parameters: those that were pending in this process, carried; see
    ``gradients``.
    """
    group = move.group
    pending = [[pending_gradient(p, optimizer) for p in parameters_of(module)] for module in group.firsts]
    if all(gradient is None for gradients in pending for gradient in gradients):
        return [[None] * len(values) for values in new]
    if group.owner.phase != int(Phase.FULL):
        return [[torch.full_like(value, torch.nan) for value, _ in values] for values in new]
    stacked, weights = [values[0][0] for values in new], [module.weight.detach() for module in group.firsts]
    factors = (torch.cat(stacked) if group.shared else stacked[0], *(value for value, _ in new[0][1:]))
    scale = ALPHA / move.rank if move.phase is Phase.ADAPTOR else 1.0
    with full_precision():
        return at_factors(group.layout, factors, [gradient for (gradient,) in pending], weights, scale)
