"""Ranks decided anew, on the weights as they are: what a plan becomes before a deflate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Never, TypeAlias

import torch
from torch import Tensor, nn

from ..checks import is_whole
from ..errors import PlanError
from ..plan import (
    Cost,
    Curve,
    Metric,
    Plan,
    PlannedSite,
    RankPolicy,
    checked_policy,
    costs_of,
    curve_of,
    ranks_by_policy,
    spectrum_of,
)
from ..rewrite import SiteGroup, plan_of, site_groups


def reranked(net: nn.Module, policy: RankPolicy, *, ladder: int = 16) -> Plan:
    """The net's plan with ranks decided anew, on its weights as they are now. ``replan_`` puts them into effect.

    A site never gets a rank at which it would cost more than its dense weight. Factors know nothing beyond their rank:
    only sites in FULL can ask for more than they have.

    Args:
        net: What ``transform`` made; it stays as it is.
        policy: The rank policy.
        ladder: Ranks are taken from a grid of so many steps between 0 and the full rank, rounded up, so that weights
            which change a little keep their rank, and with it their compiled graph.

    Returns:
        The new plan.

    Raises:
        PlanError: For what is no rank policy or no grid, and as the policy does.
    """
    if not is_whole(ladder, 1):
        raise PlanError(f"a grid of {ladder!r} ranks cannot be: give ladder as a whole number of 1 or more")
    plan, units = plan_of(net), rank_units(net, ladder=ladder)
    ranks: dict[str, int] = {}
    chosen = ranks_by_policy([checked_policy(policy)] * len(units), [unit.curve for unit in units])
    for unit, rank in zip(units, chosen, strict=True):
        wanted = min((r for r in unit.curve.grid if r >= rank), default=unit.curve.max_rank)
        paying = [r for r in unit.curve.grid if unit.pays(r)]
        kept = min(wanted, paying[-1]) if paying else unit.rows[0].rank
        ranks |= dict.fromkeys(unit.names, kept)
    return plan.with_ranks(ranks)


@dataclass(frozen=True)
class RankUnit:
    """What gets one rank: a site by itself, or the sites that share a factor.

    Attributes:
        rows: The rows of the plan, the owner of a shared factor first.
        curve: What a rank policy may look at of them.
    """

    rows: tuple[PlannedSite, ...]
    curve: Curve

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(row.site.name for row in self.rows)

    def pays(self, rank: int, *what: Metric) -> bool:
        """Whether factors of this rank cost less than the dense weight, in these things or in all that are counted."""
        costs = [self.curve.costs[name] for name in what or self.curve.costs]
        return all(cost.at(rank) < cost.dense for cost in costs if cost.dense)


_NONE: Mapping[str, Never] = {}

Spectrum: TypeAlias = Callable[[str, Tensor], Tensor | None]
"""Of a site and its weight (stacked where several share a factor), what stands for singular values; None: those."""


LatencyOf: TypeAlias = Callable[[Sequence[PlannedSite]], Cost | None]
"""What a site, or those that share a factor, take in measured time, in shares of the dense model's; None: not known."""


def rank_units(
    net: nn.Module,
    *,
    ladder: int | None = None,
    multiple_of: int = 1,
    spectrum: Spectrum | None = None,
    latency: LatencyOf | None = None,
    margin: float | None = None,
    weights: Mapping[str, float] = _NONE,
    extra: Mapping[str, int] = _NONE,
    known: Mapping[str, int] = _NONE,
) -> list[RankUnit]:
    """What of the net gets ranks, with curves of its present weights.

    ladder: see ``reranked``; by default ranks are the multiples of multiple_of. latency: adds a cost of time;
    margin: then leaves only the ranks that are faster than dense by more than this share of its time. weights: of the
    curves, by the first name. extra: parameters that a cut adds besides the factors, by the first name. known: ranks
    that weights have, by the first name.
    """
    plan = plan_of(net)
    totals = {Metric.PARAMS: plan.total_params, Metric.FLOPS: plan.total_flops}
    rows = {row.site.name: row for row in plan.sites}
    units = []
    for group in site_groups(net, rows):
        planned = tuple(rows[name] for name in group.names)
        sites = [row.site for row in planned]
        costs = costs_of(sites, group.layout, totals)
        costs[Metric.PARAMS] = _with_extra(costs[Metric.PARAMS], extra.get(group.name, 0) / max(plan.total_params, 1))
        now = partial(_spectrum, group, spectrum)
        curve = curve_of(sites, group.layout, now, costs, multiple_of=multiple_of, steps=ladder)
        curve = replace(curve, weight=weights.get(group.name, 1.0), rank=known.get(group.name, 0))
        units.append(RankUnit(planned, curve if latency is None else _timed(curve, latency(planned), margin)))
    return units


def _with_extra(cost: Cost, extra: float) -> Cost:
    return replace(cost, at=lambda rank: cost.at(rank) + extra) if extra else cost


def _timed(curve: Curve, time: Cost | None, margin: float | None) -> Curve:
    """The curve with measured times. What could not be timed counts nothing, and every rank of it stays."""
    if time is None:
        return replace(curve, costs={**curve.costs, Metric.LATENCY: Cost(0.0, lambda rank: 0.0)})
    curve = replace(curve, costs={**curve.costs, Metric.LATENCY: time})
    if margin is None:
        return curve
    ranks = curve.grid or range(1, curve.max_rank + 1)
    faster = tuple(rank for rank in ranks if time.at(rank) < (1 - margin) * time.dense)
    return replace(curve, grid=faster or (curve.max_rank,))


def _spectrum(group: SiteGroup, given: Spectrum | None) -> Tensor:
    """Singular values [g, max_rank] of the present weights, or what is given to stand for them."""
    values = None if given is None else given(group.name, group.weight)
    if values is None:
        values = spectrum_of(group.layout, [group.weight]) if group.shared else group.owner.spectrum()
    return torch.nn.functional.pad(values, (0, group.layout.max_rank(group.shape) - values.shape[-1]))
