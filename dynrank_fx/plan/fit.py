"""A plan that was read from a file, fitted to the model at hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from ..errors import PlanError
from ..ops import Op
from ..tracing import ExampleInputs, measure, meta_of
from .find import find_sites
from .locate import Located, locate, refuse_non_finite
from .plan import Plan, PlannedSite, checked_plan, checked_rows, layout_of


def fit_plan(
    net: nn.Module,
    plan: Plan,
    example_inputs: ExampleInputs | None = None,
    located: Mapping[str, Located] | None = None,
) -> Plan:
    """A given plan for this net: its layouts and ranks, with the sites and costs as found here.

    A site the plan does not list stays dense, and says so. Raises PlanError where the plan names a weight that the net
    does not have, has in another shape, cannot factor, or holds non-finite values in.
    """
    checked_plan(plan)
    located = locate(net) if located is None else located
    measured = None if example_inputs is None else measure(net, example_inputs)
    sites, skipped = find_sites(net, measured.shapes if measured else None, located)
    by_name, why = {site.name: site for site in sites}, {s.name: s.reason for s in skipped}
    rows: list[PlannedSite] = []
    for row in plan.sites:
        name, here = row.site.name, by_name.pop(row.site.name, None)
        if name in {done.site.name for done in rows}:
            raise PlanError(f"the plan has two rows for {name}; delete one")
        if here is None:
            raise PlanError(
                f"the plan factors {name}, which this model "
                + (f"keeps dense: {why[name]}" if name in why else "does not have: the plan is of another model")
            )
        if here.shape != row.site.shape:
            raise PlanError(
                f"the plan has {name} as {row.site.shape} and the model as {here.shape}: the plan is of another model"
            )
        rows.append(replace(row, site=here, layout=layout_of(here, row.layout.name)))
    checked_rows(rows)
    flops = measured.flops if measured else None
    if measured is None and [_ops(row) for row in rows] == [_ops(row) for row in plan.sites]:
        # What was measured when the plan was made still holds.
        flops = plan.total_flops
        rows = [
            replace(row, site=replace(row.site, uses=given.site.uses))
            for row, given in zip(rows, plan.sites, strict=True)
        ]
    refuse_non_finite((row.site.name for row in rows), located)
    given = {s.name: s.reason for s in plan.skipped}
    dense = [replace(s, reason=given.get(s.name, s.reason)) for s in skipped]
    dense += [s.left_dense(given.get(s.name, "left dense by the given plan")) for s in by_name.values()]
    order = {name: i for i, name in enumerate(located)}
    rows.sort(key=lambda row: order[row.site.name])
    dense.sort(key=lambda s: order[s.name])
    total = sum(p.numel() for p in net.parameters())
    capture = meta_of(net).get("capture", "")
    return Plan(tuple(rows), tuple(dense), total, flops, capture, plan.timed, plan.seconds)


def _ops(row: PlannedSite) -> list[Op]:
    """What is done with the weight; how often, only a run tells where code that is not traced calls a layer."""
    return list(dict.fromkeys(use.op for use in row.site.uses))
