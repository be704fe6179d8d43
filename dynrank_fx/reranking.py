"""Ranks decided anew, on the weights as they are: what a plan becomes before a deflate."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from . import lowrank
from .net import unwrap
from .overrides import ranks_by_policy
from .plan import Plan, PlannedSite
from .planning import costs_of
from .ranks import Cost, Curve, RankPolicy, checked_policy
from .rewrite import plan_of
from .switched import Switched, switched_modules


def reranked(net: nn.Module, policy: RankPolicy, *, ladder: int = 16) -> Plan:
    """The net's plan with ranks by this policy on its present weights, for ``replan_``; nothing is changed.

    ladder: ranks are taken from so many steps between 0 and the full rank, rounded up, so that weights which change a
    little keep their rank, and with it their compiled graph. A site never gets a rank at which it would cost more than
    its dense weight. Factors know nothing beyond their rank: only sites in FULL can ask for more than they have.
    """
    checked_policy(policy)
    plan, modules = plan_of(net), switched_modules(unwrap(net))
    totals = {"params": plan.total_params, "flops": plan.total_flops}
    rows = {row.site.name: row for row in plan.sites}
    units = [[rows[name] for name in row.pack or (row.site.name,)] for row in plan.sites]
    units = [unit for unit, row in zip(units, plan.sites, strict=True) if unit[0] is row]
    curves = []
    for unit in units:
        costs = costs_of([row.site for row in unit], unit[0].layout, totals)
        curves.append(_curve(unit, [modules[row.site.name][0] for row in unit], ladder, costs))
    ranks: dict[str, int] = {}
    for unit, curve, rank in zip(units, curves, ranks_by_policy([policy] * len(curves), curves), strict=True):
        paying = [r for r in curve.rungs if all(cost.at(r) < cost.dense for cost in curve.costs.values() if cost.dense)]
        wanted = min((r for r in curve.rungs if r >= rank), default=curve.max_rank)
        kept = min(wanted, paying[-1]) if paying else unit[0].rank
        ranks |= dict.fromkeys((row.site.name for row in unit), kept)
    return plan.with_ranks(ranks)


def _curve(unit: Sequence[PlannedSite], modules: Sequence[Switched], ladder: int, costs: dict[str, Cost]) -> Curve:
    layout = unit[0].layout
    shape = (sum(row.site.shape[0] for row in unit), *unit[0].site.shape[1:])
    limit = layout.max_rank(shape)

    def spectrum() -> Tensor:
        if len(modules) == 1:
            values = modules[0].spectrum()
        else:
            values = lowrank.singular_values(layout.to_matrix(torch.cat([m.weight.detach() for m in modules])))
        return torch.nn.functional.pad(values, (0, limit - values.shape[-1]))

    rungs = tuple(sorted({-(-limit * step // ladder) for step in range(1, ladder + 1)}))
    return Curve(unit[0].site.name, limit, spectrum, layout.matrix_shape(shape), rungs, costs)
