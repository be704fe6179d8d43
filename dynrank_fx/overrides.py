"""What is decided for single sites, by name: another rank, another layout, or to stay dense."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from .errors import PlanError
from .layout import CONV_LAYOUTS, ConvLayout
from .ranks import Cost, Curve, RankPolicy, checked_policy
from .sites import Site, Skipped


@dataclass(frozen=True)
class Override:
    """For the sites whose name fits a pattern. None keeps what holds for the others.

    rank: a rank policy of their own. layout: of convolutions. dense: they are left alone.
    """

    rank: RankPolicy | None = None
    layout: ConvLayout | None = None
    dense: bool | None = None

    def __post_init__(self) -> None:
        if self.dense not in (None, True, False):
            raise PlanError(f"{self.dense!r} does not say whether sites stay dense: give dense=True or dense=False")
        if self.rank is not None:
            checked_policy(self.rank)
        if self.layout is not None:
            checked_conv_layout(self.layout)


def checked_conv_layout(layout: ConvLayout) -> ConvLayout:
    """The layout itself. Raises PlanError for what is none of convolutions."""
    if layout not in CONV_LAYOUTS:
        names = ", ".join(each.__name__ for each in CONV_LAYOUTS)
        raise PlanError(f"{layout!r} is no layout of convolutions: give one of {names}")
    return layout


def matches(site: Site | Skipped, patterns: Iterable[str]) -> bool:
    """Whether a pattern fits the site's name, an alias, or the module that holds it (``fc`` for ``fc.weight``)."""
    return any(fits(name, pattern) for name in (site.name, *site.aliases) for pattern in patterns)


def fits(name: str, pattern: str) -> bool:
    """Whether a pattern fits the name of a weight, or of the module that holds it."""
    return any(fnmatch.fnmatchcase(each, pattern) for each in (name, name.removesuffix(".weight")))


def override_of(site: Site, overrides: Mapping[str, Override]) -> Override:
    """All that the fitting patterns say of a site together; a later one wins."""
    found = Override()
    if not isinstance(overrides, Mapping):
        raise PlanError(f"overrides are a dict from patterns to Override, not a {type(overrides).__name__}")
    for pattern, override in overrides.items():
        if not isinstance(override, Override):
            raise PlanError(
                f"the override of {pattern!r} is {override!r}: give an Override, such as Override(dense=True)"
            )
        if matches(site, [pattern]):
            said = {key: value for key, value in vars(override).items() if value is not None}
            found = replace(found, **said)
    return found


def ranks_by_policy(policies: Sequence[RankPolicy], curves: Sequence[Curve]) -> list[int]:
    """A rank per curve. Sites of one policy are decided together; the policy of most sites comes last, and is told
    what the others take.
    """
    ranks = [0] * len(curves)
    taken = {what: [cost.dense for cost in costs] for what, costs in _costs(curves).items()}
    for policy in sorted(dict.fromkeys(policies), key=list(policies).count):
        mine = [i for i, each in enumerate(policies) if each == policy]
        rest = {what: 1 - sum(c.dense for c in _costs(curves)[what]) for what in taken}
        rest = {what: rest[what] + sum(t for i, t in enumerate(taken[what]) if i not in mine) for what in taken}
        told = [_told(curves[i], rest) for i in mine]
        for i, rank in zip(mine, policy.ranks(told), strict=True):
            ranks[i] = rank
            for what, shares in taken.items():
                cost = curves[i].costs[what]
                shares[i] = min(cost.dense, cost.at(min(rank, curves[i].max_rank)))
    return ranks


def _costs(curves: Sequence[Curve]) -> dict[str, list[Cost]]:
    """The costs of all curves by what is counted, where all have it."""
    known = set.intersection(*(set(curve.costs) for curve in curves)) if curves else set()
    return {what: [curve.costs[what] for curve in curves] for what in sorted(known)}


def _told(curve: Curve, rest: Mapping[str, float]) -> Curve:
    return replace(curve, costs={what: replace(cost, rest=rest[what]) for what, cost in curve.costs.items()})
