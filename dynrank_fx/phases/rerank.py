"""Ranks decided anew, on the weights as they are: what a plan becomes before a deflate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..layouts import singular_values
from ..plan import Cost, Curve, Plan, PlannedSite, RankPolicy, checked_policy, costs_of, ranks_by_policy
from ..rewrite import Switched, plan_of, switched_modules
from ..tracing import unwrap


def reranked(net: nn.Module, policy: RankPolicy, *, ladder: int = 16) -> Plan:
    """The net's plan with ranks by this policy on its present weights, for ``replan_``; nothing is changed.

    ladder: ranks are taken from so many steps between 0 and the full rank, rounded up, so that weights which change a
    little keep their rank, and with it their compiled graph. A site never gets a rank at which it would cost more than
    its dense weight. Factors know nothing beyond their rank: only sites in FULL can ask for more than they have.
    """
    plan, units = plan_of(net), rank_units(net, ladder=ladder)
    ranks: dict[str, int] = {}
    chosen = ranks_by_policy([checked_policy(policy)] * len(units), [unit.curve for unit in units])
    for unit, rank in zip(units, chosen, strict=True):
        wanted = min((r for r in unit.curve.rungs if r >= rank), default=unit.curve.max_rank)
        paying = [r for r in unit.curve.rungs if unit.pays(r)]
        kept = min(wanted, paying[-1]) if paying else unit.rows[0].rank
        ranks |= dict.fromkeys(unit.names, kept)
    return plan.with_ranks(ranks)


@dataclass(frozen=True)
class RankUnit:
    """What gets one rank: a site, or those that share a factor, the owner first."""

    rows: tuple[PlannedSite, ...]
    curve: Curve

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(row.site.name for row in self.rows)

    def pays(self, rank: int, *what: str) -> bool:
        """Whether factors of this rank cost less than the dense weight, in these things or in all that are counted."""
        costs = [self.curve.costs[name] for name in what or self.curve.costs]
        return all(cost.at(rank) < cost.dense for cost in costs if cost.dense)


_NONE: Mapping[str, Any] = {}

Spectrum: TypeAlias = Callable[[str, Tensor], Tensor | None]
"""Of a site and its weight (stacked where several share a factor), what stands for singular values; None: those."""


Timing: TypeAlias = Callable[[Sequence[PlannedSite]], Cost | None]
"""What a site, or those that share a factor, take in measured time, in shares of the dense model's; None: not known."""


def rank_units(
    net: nn.Module,
    *,
    ladder: int | None = None,
    multiple_of: int = 1,
    spectrum: Spectrum | None = None,
    timing: Timing | None = None,
    margin: float | None = None,
    weights: Mapping[str, float] = _NONE,
    extra: Mapping[str, int] = _NONE,
    known: Mapping[str, int] = _NONE,
) -> list[RankUnit]:
    """What of the net gets ranks, with curves of its present weights.

    ladder: see ``reranked``; by default ranks are the multiples of multiple_of. timing: adds a cost of ``latency``;
    margin: then leaves only the ranks that are faster than dense by more than this share of its time. weights: of the
    curves, by the first name. extra: parameters that a cut adds besides the factors, by the first name. known: ranks
    that weights have, by the first name.
    """
    plan, modules = plan_of(net), switched_modules(unwrap(net))
    totals = {"params": plan.total_params, "flops": plan.total_flops}
    rows = {row.site.name: row for row in plan.sites}
    found = []
    for names in dict.fromkeys(row.pack or (row.site.name,) for row in plan.sites):
        unit = tuple(rows[name] for name in names)
        costs = costs_of([row.site for row in unit], unit[0].layout, totals)
        costs["params"] = _with_extra(costs["params"], extra.get(names[0], 0) / max(plan.total_params, 1))
        curve = _curve(unit, [modules[name][0] for name in names], ladder, multiple_of, costs, spectrum)
        curve = replace(curve, weight=weights.get(names[0], 1.0), rank=known.get(names[0], 0))
        found.append(RankUnit(unit, curve if timing is None else _timed(curve, timing(unit), margin)))
    return found


def _with_extra(cost: Cost, extra: float) -> Cost:
    return replace(cost, at=lambda rank: cost.at(rank) + extra) if extra else cost


def _timed(curve: Curve, time: Cost | None, margin: float | None) -> Curve:
    """The curve with measured times. What could not be timed counts nothing, and every rank of it stays."""
    if time is None:
        return replace(curve, costs={**curve.costs, "latency": Cost(0.0, lambda rank: 0.0)})
    curve = replace(curve, costs={**curve.costs, "latency": time})
    if margin is None:
        return curve
    ranks = curve.rungs or range(1, curve.max_rank + 1)
    faster = tuple(rank for rank in ranks if time.at(rank) < (1 - margin) * time.dense)
    return replace(curve, rungs=faster or (curve.max_rank,))


def _curve(
    unit: Sequence[PlannedSite],
    modules: Sequence[Switched],
    ladder: int | None,
    multiple_of: int,
    costs: dict[str, Cost],
    given: Spectrum | None,
) -> Curve:
    layout = unit[0].layout
    shape = (sum(row.site.shape[0] for row in unit), *unit[0].site.shape[1:])
    limit = layout.max_rank(shape)

    def spectrum() -> Tensor:
        weights = [module.weight.detach() for module in modules]
        values = given(unit[0].site.name, torch.cat(weights)) if given is not None else None
        if values is None and len(modules) == 1:
            values = modules[0].spectrum()
        if values is None:
            values = singular_values(layout.to_matrix(torch.cat(weights)))
        return torch.nn.functional.pad(values, (0, limit - values.shape[-1]))

    rungs: tuple[int, ...] = () if multiple_of == 1 else (*range(multiple_of, limit, multiple_of), limit)
    if ladder is not None:
        rungs = tuple(sorted({-(-limit * step // ladder) for step in range(1, ladder + 1)}))
    return Curve(unit[0].site.name, limit, spectrum, layout.matrix_shape(shape), rungs, costs)
