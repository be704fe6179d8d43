"""Rank policies: values that turn what is known of all sites into one rank per site.

A policy of your own is a class with ``ranks``, as ``RankPolicy`` says. Sources: the energy of a spectrum is Σσ²; the
scaled stable rank is that of Cuttlefish (arXiv 2305.02538).
"""

from __future__ import annotations

import enum
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from torch import Tensor

from ..checks import is_number, is_share, is_whole
from ..errors import PlanError, telling
from ..layouts import energy_rank, stable_rank
from ..text import counted


class Metric(enum.Enum):
    """What is counted of a site and of a model. The value is how a message says it.

    Attributes:
        PARAMS: Parameters.
        FLOPS: Floating-point operations on the example inputs, two a multiply-add.
        LATENCY: Measured seconds on the example inputs.
    """

    PARAMS = "parameters"
    FLOPS = "FLOPs"
    LATENCY = "measured times"


@dataclass(frozen=True)
class Cost:
    """What one site costs, as shares of what the whole dense model costs.

    Attributes:
        dense: With the dense weight.
        at: With factors of a rank; it rises with the rank.
        rest: What everything takes that is not decided together with the site.
    """

    dense: float
    at: Callable[[int], float]
    rest: float = 0.0


@dataclass(frozen=True)
class Curve:
    """What a rank policy may look at of one site.

    Attributes:
        name: The site's name.
        max_rank: The rank that loses nothing.
        spectrum: Gives the singular values, [g, max_rank] for the g groups of the weight, largest first; they are
            computed when it is called.
        matrix: Rows and columns of the matrix of one group.
        grid: The ranks to choose from, rising; empty for all.
        costs: What the site costs, by what is counted: parameters, FLOPs where the inputs are known, times where sites
            were timed.
        weight: What an error of all its energy does to the model, relative to other sites; 1 where that is not known.
        rank: The rank of the weight where it was factored before, else 0.
    """

    name: str
    max_rank: int
    spectrum: Callable[[], Tensor]
    matrix: tuple[int, int] = (1, 1)
    grid: tuple[int, ...] = ()
    costs: Mapping[Metric, Cost] = field(default_factory=dict)
    weight: float = 1.0
    rank: int = 0


class RankPolicy(Protocol):
    """What a rank policy has: ranks for all sites at once, at least 1 each, possibly above a site's limit."""

    def ranks(self, curves: Sequence[Curve]) -> list[int]:
        """Choose the ranks of all sites.

        Args:
            curves: What is known of each site, in the order of the ranks asked for.

        Returns:
            One rank per site.
        """


def checked_policy(policy: RankPolicy) -> RankPolicy:
    """The policy itself. Raises PlanError for what is none."""
    if isinstance(policy, type) or not callable(getattr(policy, "ranks", None)):
        raise PlanError(f"{policy!r} is no rank policy: give Ratio(0.25), Fixed(16), Energy(0.95) or one of your own")
    return policy


@dataclass(frozen=True)
class Fixed:
    """The same rank everywhere. Sites whose full rank is lower stay dense.

    Attributes:
        rank: The rank, 1 or more.

    Raises:
        PlanError: For a rank that is no whole number of 1 or more.
    """

    rank: int

    def __post_init__(self) -> None:
        if not is_whole(self.rank, 1):
            raise PlanError(f"a rank of {self.rank!r} cannot be; give a whole number of 1 or more")

    def ranks(self, curves: Sequence[Curve]) -> list[int]:
        """Choose the ranks of all sites.

        Args:
            curves: What is known of each site, in the order of the ranks asked for.

        Returns:
            One rank per site.

        Raises:
            PlanError:
        """
        limit = max((curve.max_rank for curve in curves), default=self.rank)
        if self.rank > limit:
            raise PlanError(
                f"rank {self.rank} is over the limit of every site (the largest is {limit}); give {limit} or less"
            )
        return [self.rank for _ in curves]


@dataclass(frozen=True)
class Ratio:
    """A share of each site's full rank: ⌊ratio · min(m, n)⌋ of a matrix [m, n], at least 1.

    Attributes:
        ratio: The share, above 0 and at most 1.

    Raises:
        PlanError: For a ratio that is no share.
    """

    ratio: float

    def __post_init__(self) -> None:
        if not is_share(self.ratio):
            raise PlanError(f"a rank ratio of {self.ratio!r} is not a fraction; give one above 0 and at most 1")

    def ranks(self, curves: Sequence[Curve]) -> list[int]:
        """Choose the ranks of all sites.

        Args:
            curves: What is known of each site, in the order of the ranks asked for.

        Returns:
            One rank per site.
        """
        # Rounded first: 0.29 · 100 is 28.999… in binary.
        return [max(1, math.floor(round(self.ratio * curve.max_rank, 9))) for curve in curves]


@dataclass(frozen=True)
class Energy:
    """The least rank that keeps a share of Σσ², measured on the weights as they are now.

    Attributes:
        share: The share of the energy to keep in every group of the weight, above 0 and at most 1.

    Raises:
        PlanError: For what is no share.
    """

    share: float

    def __post_init__(self) -> None:
        if not is_share(self.share):
            raise PlanError(f"an energy of {self.share!r} is not a share; give one above 0 and at most 1")

    def ranks(self, curves: Sequence[Curve]) -> list[int]:
        """Choose the ranks of all sites.

        Args:
            curves: What is known of each site, in the order of the ranks asked for.

        Returns:
            One rank per site.
        """
        return [min(curve.max_rank, energy_rank(curve.spectrum(), self.share)) for curve in curves]


@dataclass(frozen=True)
class StableRank:
    """The scaled stable rank of Cuttlefish (arXiv 2305.02538): ⌈stable(W) · min(m, n) / stable(W at init)⌉.

    A layer keeps full rank until training has shaped its spectrum. The stable rank at initialisation is taken as that
    of independent entries, mn / (√m + √n)², whatever the weights began as. It is measured on the weights as they are
    now: of use where ranks are decided after some training.

    Attributes:
        scale: A factor on all ranks, above 0.

    Raises:
        PlanError: For a scale that is not above 0.
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        if not is_number(self.scale, 0) or self.scale == 0:
            raise PlanError(f"stable ranks cannot be scaled by {self.scale!r}; give a number above 0")

    def ranks(self, curves: Sequence[Curve]) -> list[int]:
        """Choose the ranks of all sites.

        Args:
            curves: What is known of each site, in the order of the ranks asked for.

        Returns:
            One rank per site.
        """
        ranks = []
        for curve in curves:
            m, n = curve.matrix
            initial = m * n / (math.sqrt(m) + math.sqrt(n)) ** 2
            now = max(stable_rank(group) for group in curve.spectrum())
            ranks.append(min(curve.max_rank, max(1, math.ceil(self.scale * now * curve.max_rank / initial))))
        return ranks


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
        for i, rank in zip(mine, _checked_ranks(policy, told), strict=True):
            ranks[i] = rank
            for what, shares in taken.items():
                cost = curves[i].costs[what]
                shares[i] = min(cost.dense, cost.at(min(rank, curves[i].max_rank)))
    return ranks


def _checked_ranks(policy: RankPolicy, curves: Sequence[Curve]) -> list[int]:
    """What the policy says, which may be anybody's. Raises PlanError where that is not one rank for each curve."""
    with telling(f"the rank policy {policy!r}", PlanError):
        ranks = policy.ranks(curves)
    if len(ranks) != len(curves) or not all(is_whole(rank, 1) for rank in ranks):
        raise PlanError(
            f"the rank policy {policy!r} gave {textwrap.shorten(str(ranks), 100)} for "
            f"{counted(len(curves), 'site')}: it has to give one rank for each, a whole number of 1 or more"
        )
    return [int(rank) for rank in ranks]


def _costs(curves: Sequence[Curve]) -> dict[Metric, list[Cost]]:
    """The costs of all curves by what is counted, where all have it."""
    known = set.intersection(*(set(curve.costs) for curve in curves)) if curves else set()
    return {what: [curve.costs[what] for curve in curves] for what in Metric if what in known}


def _told(curve: Curve, rest: Mapping[Metric, float]) -> Curve:
    return replace(curve, costs={what: replace(cost, rest=rest[what]) for what, cost in curve.costs.items()})


def rank_grid(limit: int, multiple_of: int = 1, *, steps: int | None = None) -> tuple[int, ...]:
    """The ranks to choose from, rising to the limit: multiples of a number, or so many even steps; empty for all."""
    if steps is not None:
        return tuple(sorted({-(-limit * step // steps) for step in range(1, steps + 1)}))
    return () if multiple_of == 1 else (*range(multiple_of, limit, multiple_of), limit)
