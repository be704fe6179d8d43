"""Ranks of all sites by one global budget: the least error that a model of a given cost can have.

Every site has a curve of (cost, error) over its ranks, the dense weight being its last point, at error 0. The lower
convex hulls of all curves are gone along together, always the steepest step next (one multiplier on cost for all
sites: Shoham and Gersho, "Efficient bit allocation for an arbitrary set of quantizers", IEEE Transactions on Acoustics,
Speech, and Signal Processing 36(9), 1988), and what is left of the budget is filled greedily. Errors are shares,
Σ_{i>r} σ_i² / Σ σ_i², by the weight of the site.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from ..checks import check_flags, is_share
from ..errors import PlanError
from .ranks import Curve, Metric

Point: TypeAlias = tuple[float, float, int]
"""(cost, error, rank) of a site."""

_ROUNDING = 1e-12
_BISECTIONS = 24


@dataclass(frozen=True)
class Budget:
    """The ranks of least error with which the whole model takes a share of what the dense one takes.

    Give one of the three shares, or several, which then are all kept to. A site whose factors would cost no less than
    its dense weight gets its full rank.

    Attributes:
        params: The share of the dense model's parameters, above 0 and at most 1.
        flops: The share of the dense model's FLOPs on the example inputs (two a multiply-add), above 0 and at most 1.
        latency: The share of the dense model's measured time, above 0 and at most 1, where sites have been timed (see
            ``compress``).
        even: Whether all sites get one ratio of their full rank, in place of the ranks of least error.

    Raises:
        PlanError: Where no share is given, or one that is no share.
    """

    params: float | None = None
    flops: float | None = None
    latency: float | None = None
    even: bool = False

    def __post_init__(self) -> None:
        if not self.shares:
            raise PlanError("a budget is of something: give params=0.5, flops=0.5 or latency=0.8, or several of them")
        for share in self.shares.values():
            if not is_share(share):
                raise PlanError(f"a budget of {share!r} is no share of the dense model; give one above 0 and at most 1")
        check_flags(PlanError, even=self.even)

    @property
    def shares(self) -> dict[Metric, float]:
        """The shares by what they are of."""
        shares = {Metric.PARAMS: self.params, Metric.FLOPS: self.flops, Metric.LATENCY: self.latency}
        return {what: share for what, share in shares.items() if share is not None}

    def ranks(self, curves: Sequence[Curve]) -> list[int]:
        """Choose the ranks of all sites.

        Args:
            curves: What is known of each site, in the order of the ranks asked for.

        Returns:
            One rank per site.

        Raises:
            PlanError:
        """
        if not curves:
            return []
        for metric in self.shares:
            if any(metric not in curve.costs for curve in curves):
                how = "give example inputs"
                if metric is Metric.LATENCY:
                    how = "let compress measure them (without `--no-timing`, in Python times=SiteTimes())"
                raise PlanError(f"the {metric.value} of the sites are unknown: {how}, or give a budget of parameters")
        alone = {metric: self._ranks_by(metric, share, curves) for metric, share in self.shares.items()}
        if len(alone) == 1:
            return next(iter(alone.values()))
        fitting = [ranks for metric in alone if (ranks := self._fitting(metric, curves)) is not None]
        if not fitting:
            shares = " and ".join(f"{share:g} of the dense {metric.value}" for metric, share in self.shares.items())
            raise PlanError(f"{shares} cannot be met together: give more of one of them, or leave less of it dense")
        return min(fitting, key=lambda ranks: sum(_error(c, r) for c, r in zip(curves, ranks, strict=True)))

    def _ranks_by(self, metric: Metric, share: float, curves: Sequence[Curve]) -> list[int]:
        """The ranks by one share alone."""
        room = share - curves[0].costs[metric].rest
        points = [points_of(curve, metric) for curve in curves]
        least = sum(row[0][0] for row in points)
        if least > room + _ROUNDING:
            raise PlanError(
                f"{share:g} of the dense {metric.value} cannot be met: with the least ranks the model still takes "
                f"{least + curves[0].costs[metric].rest:.4f} of them; give that or more, or leave less of it dense"
            )
        chosen = _even(points, room) if self.even else allocate(points, room)
        return [row[i][2] for row, i in zip(points, chosen, strict=True)]

    def _fitting(self, metric: Metric, curves: Sequence[Curve]) -> list[int] | None:
        """The ranks by the largest share of one thing, at most its own, with which all shares are kept to."""
        low, high = 0.0, self.shares[metric]
        best, tried = None, high
        for _ in range(_BISECTIONS):
            try:
                ranks = self._ranks_by(metric, tried, curves)
            except PlanError:  # there is no less
                low = tried
            else:
                if self._kept(ranks, curves):
                    best, low = ranks, tried
                else:
                    high = tried
            if low == self.shares[metric]:
                break
            tried = (low + high) / 2
        return best

    def _kept(self, ranks: Sequence[int], curves: Sequence[Curve]) -> bool:
        """Whether the model of these ranks keeps to all shares. What does not pay in each of them stays dense."""
        taken = dict.fromkeys(self.shares, 0.0)
        for curve, rank in zip(curves, ranks, strict=True):
            costs = {metric: curve.costs[metric] for metric in taken}
            pays = rank < curve.max_rank and all(c.at(rank) < c.dense for c in costs.values() if c.dense)
            for metric, cost in costs.items():
                taken[metric] += cost.at(rank) if pays else cost.dense
        return all(taken[m] + curves[0].costs[m].rest <= share + _ROUNDING for m, share in self.shares.items())


def _error(curve: Curve, rank: int) -> float:
    """The share of a site's energy that a rank takes away, by the weight of the site."""
    energy = curve.spectrum().square().sum(0)
    return curve.weight * float(energy[rank:].sum() / energy.sum().clamp_min(1e-30))


def points_of(curve: Curve, metric: Metric) -> list[Point]:
    """The ranks worth having, by rising cost: those that cost less than dense, up to the rank that the weight has; else
    dense itself as the full rank.
    """
    spectrum, cost = curve.spectrum(), curve.costs[metric]
    energy = spectrum.square().sum(0)
    total = float(energy.sum()) or 1.0
    tail = (energy.sum() - energy.cumsum(0)).clamp_min(0).tolist()
    ranks = curve.grid or range(1, curve.max_rank + 1)
    points: list[Point] = []
    for r in ranks:
        if cost.at(r) < cost.dense:
            if r >= curve.rank > 0:
                return [*points, (cost.at(r), 0.0, r)]
            points.append((cost.at(r), curve.weight * tail[r - 1] / total, r))
    return [*points, (cost.dense, 0.0, curve.max_rank)]


def _even(points: Sequence[Sequence[Point]], room: float) -> list[int]:
    """An index into each site's points: those of the largest ratio of the last rank at which all costs fit."""

    def at(ratio: float) -> list[int]:
        return [max(0, sum(p[2] <= ratio * row[-1][2] for p in row) - 1) for row in points]

    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        fits = sum(row[i][0] for row, i in zip(points, at(middle), strict=True)) <= room + _ROUNDING
        low, high = (middle, high) if fits else (low, middle)
    return at(low)


def allocate(points: Sequence[Sequence[Point]], room: float) -> list[int]:
    """An index into each site's points, rising in cost, so that costs sum to at most ``room`` and errors to little.

    Along the hulls every choice is the best for what it costs. Where the next vertex of a site no longer fits, its hull
    is drawn anew over the points that do.
    """
    at = [0] * len(points)
    left = room - sum(row[0][0] for row in points)
    hulls = [_hull(row, 0, left) for row in points]
    heap = [(_slope(points[site], hull), site) for site, hull in enumerate(hulls) if len(hull) > 1]
    heapq.heapify(heap)
    while heap:
        _, site = heapq.heappop(heap)
        row, hull = points[site], hulls[site]
        step = row[hull[1]][0] - row[hull[0]][0]
        if step > left + _ROUNDING:
            hulls[site] = _hull(row, hull[0], left)
        else:
            left -= step
            at[site] = hull[1]
            hulls[site] = hull[1:]
        if len(hulls[site]) > 1:
            heapq.heappush(heap, (_slope(row, hulls[site]), site))
    return _fill(points, at, left)


def _hull(row: Sequence[Point], start: int, left: float) -> list[int]:
    """The vertices of the lower convex hull of a site's points from one on, up to what fits."""
    hull: list[int] = []
    for i in range(start, len(row)):
        if row[i][0] - row[start][0] > left + _ROUNDING:
            break
        while len(hull) > 1 and _turns_down(row[hull[-2]], row[hull[-1]], row[i]):
            hull.pop()
        hull.append(i)
    return hull


def _turns_down(a: Point, b: Point, c: Point) -> bool:
    """Whether b lies on or above the line from a to c."""
    return (b[1] - a[1]) * (c[0] - a[0]) >= (c[1] - a[1]) * (b[0] - a[0])


def _slope(row: Sequence[Point], hull: Sequence[int]) -> float:
    here, there = row[hull[0]], row[hull[1]]
    return (there[1] - here[1]) / max(there[0] - here[0], 1e-18)


def _fill(points: Sequence[Sequence[Point]], chosen: list[int], left: float) -> list[int]:
    """Spend what is left on the single steps that gain most, hull or not."""
    while True:
        gains = [
            (points[site][at][1] - points[site][i][1], site, i)
            for site, at in enumerate(chosen)
            for i in range(at + 1, len(points[site]))
            if points[site][i][0] - points[site][at][0] <= left + _ROUNDING
        ]
        gain, site, to = max(gains, default=(0.0, 0, 0))
        if gain <= 0:
            return chosen
        left -= points[site][to][0] - points[site][chosen[site]][0]
        chosen[site] = to
