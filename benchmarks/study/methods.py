"""The ways to train that the study compares."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import dynrank_fx as dr
from dynrank_fx.phase import Phase
from dynrank_fx.phases import Carry
from dynrank_fx.schedules import TrainState
from dynrank_fx.training import Preset

FULL, LOW, ADAPTOR = Phase.FULL, Phase.LOW, Phase.ADAPTOR
COST = 0.75
"""The budget of compute, as a share of dense training at the task's number of epochs."""

Costs = Mapping[Phase, float]
"""What an epoch costs with every site in a phase, in dense epochs."""


def _paper(epochs: int, last: Phase) -> Preset:
    """The paper's placement on CIFAR-10, 55 and 120 of 150 epochs, random init, a fresh optimizer at each switch."""
    schedule = Chosen(frozenset(range(round(epochs * 55 / 150), round(epochs * 120 / 150))), last)
    return Preset(schedule, carry=Carry.RESET, decay=dr.Decay.EACH, random_init=True)


def _full_epochs(epochs: int, costs: Costs) -> int:
    """How many epochs of FULL the budget pays for, the others being LOW."""
    return max(1, int((COST * epochs - costs[LOW] * epochs) / (1 - costs[LOW]) + 1e-9))


def _block(start: float) -> Callable[[int, Costs], Preset]:
    """One block of FULL at the size of the budget, from this share of the epochs left beside it."""

    def way(epochs: int, costs: Costs) -> Preset:
        length = _full_epochs(epochs, costs)
        first = round(start * (epochs - length))
        return Preset(Chosen(frozenset(range(first, first + length))))

    return way


def _spread(epochs: int, costs: Costs) -> Preset:
    """As many FULL epochs, one at a time, evenly spread, with LOW at the end."""
    length = _full_epochs(epochs, costs)
    chosen = frozenset(int(i * (epochs - 1) / length) for i in range(length))
    return Preset(Chosen(chosen))


@dataclass(frozen=True)
class Chosen:
    """FULL in these epochs, ``last`` after all of them, LOW else."""

    full: frozenset[int]
    last: Phase = LOW

    def __call__(self, state: TrainState) -> Phase:
        if state.epoch in self.full:
            return FULL
        return self.last if state.epoch > max(self.full, default=0) else LOW


def _interleaved(epochs: int, costs: Costs) -> Preset:
    return Preset(Chosen(frozenset(range(2, epochs - 1, 3))))


def _tight(**options: float) -> Callable[[int, Costs], Preset]:
    """``auto`` with half of what COST pays for above LOW."""
    return lambda epochs, costs: Preset(dr.schedules.auto((COST + costs[LOW]) / 2, **options), landing=True)


SCALED = "low, spectral + Frobenius, scaled steps"
"""LOW alone, in which factors move in the measure of their product."""

NARROWER = "narrower dense"
"""Another model: the dense one that takes as many FLOPs as LOW does."""

METHODS: dict[str, Callable[[int, Costs], Preset]] = {
    "dense": lambda epochs, costs: Preset(dr.schedules.always(FULL)),
    "low, random init": lambda epochs, costs: Preset(dr.schedules.always(LOW), decay=dr.Decay.EACH, random_init=True),
    "low, spectral + Frobenius": lambda epochs, costs: Preset(dr.schedules.always(LOW)),
    "warm-up, then low": _block(0.0),
    "paper, adaptor": lambda epochs, costs: _paper(epochs, ADAPTOR),
    "paper, truncated": lambda epochs, costs: _paper(epochs, LOW),
    "interleaved": _interleaved,
    "auto": lambda epochs, costs: Preset(dr.schedules.auto(COST), landing=True),
    # What the parts of auto are worth.
    "auto, abrupt": lambda epochs, costs: Preset(dr.schedules.auto(COST)),
    "warm-up with landing": lambda epochs, costs: replace(_block(0.0)(epochs, costs), landing=True),
    "short warm-up with landing": lambda epochs, costs: Preset(dr.schedules.warm_up(max(1, epochs // 4)), landing=True),
    "auto, fresh state at the cut": lambda epochs, costs: Preset(
        dr.schedules.auto(COST), carry=Carry.RESET, landing=True
    ),
    # Where FULL epochs are worth most, at one budget.
    "FULL early": _block(0.0),
    "FULL around the first decay": _block(0.5),
    "FULL late": _block(0.8),
    "FULL spread": _spread,
    # What becomes of the optimizer's state, over several switches.
    "state moved": _interleaved,
    "state reset": lambda epochs, costs: Preset(_interleaved(epochs, costs).schedule, carry=Carry.RESET),
    "state reset, re-warmed": lambda epochs, costs: Preset(
        _interleaved(epochs, costs).schedule, carry=Carry.RESET, rewarm=30
    ),
    "state moved, re-warmed": lambda epochs, costs: Preset(_interleaved(epochs, costs).schedule, rewarm=30),
    NARROWER: lambda epochs, costs: Preset(dr.schedules.always(FULL)),
    SCALED: lambda epochs, costs: Preset(dr.schedules.always(LOW), factor_steps=dr.Steps.PRODUCT),
    # With guard.SpectralGuard beside it.
    "spectral norm held": _interleaved,
    # What it is worth to hold a part of the budget back and to inflate sites again, where the budget does not last to
    # the recovery point anyway: at the default threshold, below which no site falls here, and at one that some do.
    "auto, tight": _tight(),
    "auto, tight, a third held back": _tight(reserve=1 / 3),
    "auto, tight, a third to inflate again": _tight(collapse=0.95, reserve=1 / 3),
    "auto, tight, two thirds to inflate again": _tight(collapse=0.95, reserve=2 / 3),
}


def epochs_within(method: str, epochs: int, costs: Costs, budget: float) -> int:
    """The most epochs at which the method takes no more than the budget; ``auto`` keeps to it by itself.

    costs: of an epoch in each phase. budget: in their unit.
    """
    if method.startswith("auto"):
        return epochs
    found = 1
    for count in range(1, 6 * epochs):
        schedule = METHODS[method](count, costs).schedule
        phases = [schedule(TrainState(epoch, count)) for epoch in range(count)]
        if sum(costs[phase] for phase in phases if isinstance(phase, Phase)) <= budget + 1e-9:
            found = count
    return found
