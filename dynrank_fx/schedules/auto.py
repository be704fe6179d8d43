"""The schedule that places its FULL epochs by what it measures, within a budget of compute.

A site whose spectrum fits into its rank gains nothing from more FULL epochs, and a cut needs learning rate after it to
recover from. So every site starts FULL and is cut when the first of these holds:

- its spectrum fits: the energy beyond its rank is a small share of the whole, so that the cut loses nothing;
- the learning rate still to come falls to what LOW needs to recover;
- the budget is used up; the sites that would lose most by a cut are kept FULL for what is left of it.

A site has collapsed where the effective rank of what its rank keeps (the exp of the entropy of those singular values,
normalised: Roy and Vetterli, EUSIPCO 2007) is a small share of that rank. In LOW it is inflated again, the most
collapsed site first, while the learning rate still to come and the budget allow it. It then stays FULL, even if its
spectrum fits, until that share is at the square root of the threshold: what is just above the threshold would be below
it again an epoch later. That FULL epochs restore the effective rank which low-rank training loses is the finding of
arXiv 2508.08625, whose own schedule has fixed epochs; the rules of this one are this project's.

A part of the budget can be held back for that. What is held back is spread evenly over the epochs that may be FULL, so
that it is not lost: what no collapsed site takes of it keeps those sites FULL that would lose most by a cut.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar

from ..checks import is_number
from ..errors import ScheduleError
from ..phase import Phase
from ..text import counted
from .state import Decision, SiteState, TrainState

_ROUNDING = 1e-9


@dataclass(frozen=True)
class Auto:
    """The schedule that ``schedules.auto`` makes; the module says how it decides.

    Attributes:
        cost: The budget: training compute of the whole run, as a share of dense training, from 0 to 1.
        recovery: The share of the run's summed learning rate that is kept for LOW.
        tail: A site is cut at once when the share of its energy Σσ² beyond its rank is at most this.
        collapse: A site is inflated when the effective rank of what it keeps falls below this share of its rank.
        reserve: The share of what the budget leaves above LOW that is held back for inflating.

    Raises:
        ScheduleError: For a number that is not from 0 to 1; when called, for a state without sites or without the
            number of epochs.
    """

    cost: float
    recovery: float
    tail: float
    collapse: float
    reserve: float

    within_epochs: ClassVar[bool] = True
    """It counts no epochs, so that a run of few of them asks it several times in each."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not is_number(value, 0, 1):
                raise ScheduleError(f"auto's {name} is a share, from 0 to 1, not {value!r}")

    def __call__(self, state: TrainState) -> Decision:
        """Decide the phase of every site for the epoch that begins.

        Args:
            state: What ``train_state`` collected.

        Returns:
            A phase by site name, with the reasons.

        Raises:
            ScheduleError: Where the state has no sites, or not the number of epochs.
        """
        if state.epochs is None or not state.sites:
            raise ScheduleError("auto needs the number of epochs and the sites: make its state by train_state()")
        sites, rates = state.sites, _rates_left(state)
        full = [name for name, site in sites.items() if state.epoch == 0 or site.phase is Phase.FULL]
        epochs = sum(rate > self.recovery for rate in rates)  # that may be FULL, from this one on
        if not epochs and state.epoch > 0:
            late = f"cut: {rates[0]:.0%} of the learning rate is left, which LOW needs to recover"
            return _decided(sites, (), [late if full else "LOW: every site is cut"])

        seen = {name: _Seen.of(state.spectra[name], site) for name, site in sites.items()}
        collapsed = self._collapsed(seen, full)
        first = _with_sharing(collapsed, sites)
        losing = [name for name in full if name not in first and seen[name].tail > self.tail]
        others = _with_sharing(sorted(losing, key=lambda name: -seen[name].tail), sites)
        fitting = [name for name in full if name not in first and name not in others]

        low = 1 - sum(_price(site) for site in sites.values())
        free = self.cost * state.epochs - state.spent - low * (state.epochs - state.epoch)
        held = self.reserve * (self.cost - low) * state.epochs
        kept = _affordable(first, sites, free, due=free)
        spare = free - sum(_price(sites[name]) for name in kept)
        kept += _affordable(others, sites, spare, due=max(free - held, free / max(epochs, 1)))

        reasons = [
            f"cut {name}: beyond rank {sites[name].rank} is {seen[name].tail:.1%} of its energy" for name in fitting
        ]
        for name in collapsed:
            verb = f"keep {name} FULL" if name in full else f"inflate {name}"
            if name not in kept:
                verb = f"the budget of {self.cost:g} of dense training does not pay to {verb}"
            reasons.append(f"{verb}: its effective rank is {seen[name]}")
        if kept:
            reasons.append(
                f"FULL for {len(kept)} of {counted(len(sites), 'site')}: {free:.2f} dense {state.unit}s of compute "
                f"are left above LOW, and {rates[0]:.0%} of the learning rate"
            )
        if cut := [name for name in others if name not in kept]:
            what = "the others" if kept or fitting else "every site"
            spare = free - sum(_price(sites[name]) for name in kept)
            if low > self.cost + _ROUNDING:
                reasons.append(
                    f"cut {what}: LOW alone costs {low:.2f} of dense training, above the budget of {self.cost:g}"
                )
            elif spare < min(_price(sites[name]) for name in cut) - _ROUNDING:
                reasons.append(f"cut {what}: the budget of {self.cost:g} of dense training is used up")
            else:
                reasons.append(f"cut {what}: {spare:.2f} dense {state.unit}s are held back for sites that may collapse")
        return _decided(sites, kept, reasons or ["LOW: every site is cut"])

    def _collapsed(self, seen: Mapping[str, _Seen], full: Sequence[str]) -> list[str]:
        """The sites whose rank has collapsed, and those inflated that have not recovered yet: those first, since what
        was begun goes on, then the most collapsed.
        """
        limits = {name: math.sqrt(self.collapse) if name in full else self.collapse for name in seen}
        below = [name for name in seen if seen[name].share < limits[name]]
        return sorted(below, key=lambda name: (name not in full, seen[name].share))


def auto(
    cost: float = 0.75, *, recovery: float = 0.25, tail: float = 0.01, collapse: float = 0.5, reserve: float = 0.0
) -> Auto:
    """FULL where and while it is worth most, within ``cost`` of the compute of dense training; LOW to the end.

    It reads the learning rates of the run and the spectra of the sites (the module ``schedules.auto`` says how). They
    are collected by ``dynrank-fx train`` and by the hooks for other trainers; in a loop of your own, by ``Phases`` or
    ``train_state``. Every decision comes with its reasons.

    Args:
        cost: Training compute of the whole run, as a share of dense training, from 0 to 1.
        recovery: The share of the run's summed learning rate that is kept for LOW, to recover from the cut.
        tail: A site is cut at once when the share of its energy Σσ² beyond its rank is at most this.
        collapse: A site is inflated when the effective rank (Roy and Vetterli, EUSIPCO 2007) of what it keeps falls
            below this share of its rank.
        reserve: The share of what the budget leaves above LOW that is held back for inflating. What no site needs of it
            is spent on FULL epochs like the rest.

    Returns:
        The schedule.

    Raises:
        ScheduleError: For a number that is not from 0 to 1.
    """
    return Auto(cost, recovery, tail, collapse, reserve)


@dataclass(frozen=True)
class _Seen:
    """What a spectrum says of a site. tail: the share of Σσ² beyond its rank. effective: the effective rank of what the
    rank keeps, ``count`` singular values; 0 for zeros.
    """

    tail: float
    effective: float
    count: int

    @classmethod
    def of(cls, spectrum: Sequence[float], site: SiteState) -> _Seen:
        kept, beyond = spectrum[: site.groups * site.rank], spectrum[site.groups * site.rank :]
        energy, total = sum(value * value for value in spectrum), sum(kept)
        tail = sum(value * value for value in beyond) / energy if energy else 0.0
        shares = [value / total for value in kept if value > 0]
        effective = math.exp(-sum(share * math.log(share) for share in shares)) if shares else 0.0
        return cls(tail, effective, len(kept))

    @property
    def share(self) -> float:
        return self.effective / self.count

    def __str__(self) -> str:
        return f"{self.effective:.1f} of {self.count}, {self.share:.0%}"


def _decided(sites: Mapping[str, SiteState], full: Sequence[str], reasons: Sequence[str]) -> Decision:
    return Decision({name: Phase.FULL if name in full else Phase.LOW for name in sites}, tuple(reasons))


def _rates_left(state: TrainState) -> list[float]:
    """The share of the run's learning rate that is still to come at this epoch and at every later one; of its epochs
    where the rates are not known.
    """
    assert state.epochs is not None
    rates = state.lrs if len(state.lrs) == state.epochs and sum(state.lrs) > 0 else (1.0,) * state.epochs
    left = list(accumulate(reversed(rates)))[::-1]
    return [value / left[0] for value in left[state.epoch :]]


def _price(site: SiteState) -> float:
    """What an epoch of FULL costs above one of LOW, in epochs of the dense model."""
    return site.dense - site.low


def _with_sharing(names: Sequence[str], sites: Mapping[str, SiteState]) -> list[str]:
    """These sites, each with those that share a factor with it, and so its phase."""
    return list(dict.fromkeys(mate for name in names for mate in (name, *sites[name].sharing)))


def _affordable(names: Sequence[str], sites: Mapping[str, SiteState], free: float, due: float) -> list[str]:
    """The first of the sites that one more epoch of FULL can be paid for, until what is due is spent; sites that
    share a factor together.
    """
    kept, paid = list[str](), 0.0
    for unit in dict.fromkeys(sites[name].sharing or (name,) for name in names):
        price = sum(_price(sites[name]) for name in unit)
        if paid + _ROUNDING < due and paid + price <= free + _ROUNDING:
            kept += unit
            paid += price
    return kept
