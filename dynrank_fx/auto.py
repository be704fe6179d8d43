"""The schedule that places its FULL epochs by what it measures, within a budget of compute.

A site whose spectrum fits into its rank gains nothing from more FULL epochs, and a cut needs learning rate after it to
recover from. So every site starts FULL and is cut once, when the first of these holds:

- its spectrum fits: the energy beyond its rank is a small share of the whole, so that the cut loses nothing;
- the learning rate still to come falls to what LOW needs to recover;
- the budget is used up; the sites that would lose most by a cut are kept FULL for what is left of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .errors import ScheduleError
from .phase import Decision, Phase, SiteState, TrainState


@dataclass(frozen=True)
class Auto:
    """See ``schedules.auto``."""

    cost: float
    recovery: float
    tail: float

    def __post_init__(self) -> None:
        for name, value in (("cost", self.cost), ("recovery", self.recovery), ("tail", self.tail)):
            if not 0 <= value <= 1:
                raise ScheduleError(f"auto's {name} is a share, from 0 to 1, not {value}")

    def __call__(self, state: TrainState) -> Decision:
        if state.epochs is None or not state.sites:
            raise ScheduleError("auto needs the number of epochs and the sites: make its state by train_state()")
        sites, reasons = state.sites, []
        full = [name for name, site in sites.items() if state.epoch == 0 or site.phase is Phase.FULL]
        if not full:
            return _decided(sites, (), ["LOW: every site is cut"])
        left = _rate_left(state)
        if left <= self.recovery and state.epoch > 0:
            return _decided(sites, (), [f"cut: {left:.0%} of the learning rate is left, which LOW needs to recover"])
        tails = {name: _tail(state.spectra[name], sites[name].rank) for name in full}
        fitting = [name for name in full if tails[name] <= self.tail]
        for name in fitting:
            reasons.append(f"cut {name}: beyond rank {sites[name].rank} is {tails[name]:.1%} of its energy")
        free = self._free(state)
        kept = _affordable([name for name in full if name not in fitting], sites, tails, free)
        if kept:
            reasons.append(
                f"FULL for {len(kept)} of {len(sites)} sites: {free:.2f} dense epochs of compute are left above LOW, "
                f"and {left:.0%} of the learning rate"
            )
        if len(kept) + len(fitting) < len(full):
            what = "the others" if kept or fitting else "every site"
            reasons.append(f"cut {what}: the budget of {self.cost:g} of dense training is used up")
        return _decided(sites, kept, reasons)

    def _free(self, state: TrainState) -> float:
        """What may be spent above LOW to the end, in epochs of the dense model."""
        assert state.epochs is not None
        low = 1 - sum(site.dense - site.low for site in state.sites.values())
        return self.cost * state.epochs - state.spent - (state.epochs - state.epoch) * low


def _decided(sites: Mapping[str, SiteState], full: Sequence[str], reasons: Sequence[str]) -> Decision:
    return Decision({name: Phase.FULL if name in full else Phase.LOW for name in sites}, reasons)


def _rate_left(state: TrainState) -> float:
    """The share of the run's learning rate that is still to come; of its epochs where the rates are not known."""
    assert state.epochs is not None
    rates = state.lrs if len(state.lrs) == state.epochs and sum(state.lrs) > 0 else (1.0,) * state.epochs
    return sum(rates[state.epoch :]) / sum(rates)


def _tail(spectrum: Sequence[float], rank: int) -> float:
    """The share of Σσ² beyond a rank."""
    total = sum(value * value for value in spectrum)
    return sum(value * value for value in spectrum[rank:]) / total if total else 0.0


def _affordable(
    names: Sequence[str], sites: Mapping[str, SiteState], tails: Mapping[str, float], free: float
) -> list[str]:
    """The sites that one more epoch of FULL can be paid for, those that would lose most by a cut first."""
    kept = []
    for name in sorted(names, key=lambda name: -tails[name]):
        price = sites[name].dense - sites[name].low
        if price <= free + 1e-9:
            free -= price
            kept.append(name)
    return kept
