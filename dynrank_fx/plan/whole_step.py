"""What each site takes of a training step of the whole model, in measured time.

The whole model is timed dense and with every site factored, in turn, and each site by itself: of what the whole saves,
a site is given the share that it has of what all save by themselves. With times d_i and l_i of the sites, D and L of
the whole, the site i takes, in parts of D,

    factored  max(0, d_i / max(D, Σd) − s_i),    dense  s_i more,    where  s_i = (1 − L/D) · (d_i − l_i) / Σ(d − l),

so that the shares that are factored and dense differ by 1 − L/D in all: by itself a site finds other caches than within
the model, and what is around it is not fused with it.
"""

from __future__ import annotations

from dataclasses import replace

from ..timing import Pair
from .plan import Plan, PlannedSite


def with_whole(plan: Plan, whole: Pair) -> Plan:
    """The plan with what its sites take of a step of the whole model, of which these are the times, dense (first) and
    with every site factored.

    A site that was not timed by itself is taken to run as many FLOPs in a second as the others.
    """
    times = _times_of(plan.sites)
    dense, saved = sum(d for d, _ in times), sum(d - low for d, low in times)
    if not times or saved <= 0:
        return plan
    gain = max(0.0, 1 - whole.ratio) / saved
    rows = []
    for row, (d, low) in zip(plan.sites, times, strict=True):
        factored = max(0.0, d / max(whole.first, dense) - gain * (d - low))
        rows.append(replace(row, step=(factored + gain * (d - low), factored)))
    return replace(plan, sites=tuple(rows), seconds=(whole.first, whole.ratio * whole.first))


def _times_of(rows: tuple[PlannedSite, ...]) -> list[tuple[float, float]]:
    """The times of each site; none of one whose times are with those of another, with which it shares a factor."""
    known = [(row.seconds[0], row.site.flops) for row in rows if row.seconds and row.site.flops]
    speed = sum(seconds for seconds, _ in known) / sum(flops for _, flops in known) if known else 1.0
    of_others = {name for row in rows if row.seconds for name in row.sharing[1:]}

    def times(row: PlannedSite) -> tuple[float, float]:
        if row.site.name in of_others:
            return 0.0, 0.0
        return row.seconds or (speed * (row.site.flops or 0), speed * (row.flops or 0))

    return [times(row) for row in rows]
