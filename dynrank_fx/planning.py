"""Deciding: from a net, a rank policy and name patterns to a Plan; nothing is rewritten here."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from .errors import PlanError
from .finding import find_sites
from .interpret import measure
from .layout import ChannelLayout, ConvLayout, Layout, layout_for
from .locate import locate, meta_of, refuse_non_finite
from .ops import ConvOp, ConvTransposeOp, Op
from .overrides import Override, checked_conv_layout, matches, override_of, ranks_by_policy
from .packs import curve_of, packs_of
from .plan import Plan, PlannedSite, checked_rows, layout_of
from .ranks import Cost, RankPolicy, checked_policy
from .roles import Role, roles_of
from .sites import Site, Skipped

_NONE: Mapping[str, Override] = {}


def make_plan(
    net: nn.Module,
    rank: RankPolicy,
    example_inputs: Any = None,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    overrides: Mapping[str, Override] = _NONE,
    multiple_of: int = 1,
    conv_layout: ConvLayout = ChannelLayout,
    share_inputs: bool = False,
    leave: Collection[Role] = (),
    allow_unprofitable: bool = False,
) -> Plan:
    """Decide on data, before anything is rewritten: ranks for every site that may be factored and pays.

    include, exclude: shell patterns on site names and aliases; all sites by default. overrides: by such a pattern, what
    is decided otherwise (see ``Override``); a later one wins. multiple_of: ranks are rounded up to it. share_inputs:
    linears that read the same input (query, key and value; gate and up) share their right factor, at a rank decided for
    all of them together. leave: roles whose weights stay dense, as far as the graphs tell them. A site is skipped
    where its factors would cost no less than the dense weight, in parameters or in FLOPs, unless allow_unprofitable.

    Raises PlanError for a pattern that matches nothing, a rank that no site can have, or non-finite weights.
    """
    if multiple_of < 1:
        raise PlanError(f"ranks cannot be multiples of {multiple_of}; give 1 or more")
    checked_policy(rank)
    checked_conv_layout(conv_layout)
    include, exclude = ((names,) if isinstance(names, str) else tuple(names) for names in (include, exclude))
    measured = None if example_inputs is None else measure(net, example_inputs)
    sites, skipped = find_sites(net, measured.shapes if measured else None)
    _check_patterns([*include, *exclude, *overrides], [*sites, *skipped])
    said = {site.name: override_of(site, overrides) for site in sites}
    _check_layouts(overrides, sites)
    located = locate(net)
    reasons = _left_alone(sites, include, exclude, said, roles_of(located) if leave else {}, leave)
    chosen = [site for site in sites if site.name not in reasons]
    refuse_non_finite((site.name for site in chosen), located)
    packs = packs_of(chosen, located, said) if share_inputs else [[site] for site in chosen]
    layouts = [layout_for(pack[0].uses[0].op, said[pack[0].name].layout or conv_layout) for pack in packs]
    total, flops = sum(p.numel() for p in net.parameters()), measured.flops if measured else None
    totals = {"params": total, "flops": flops}
    curves = [
        curve_of(pack, layout, located, multiple_of, costs_of(pack, layout, totals))
        for pack, layout in zip(packs, layouts, strict=True)
    ]
    rows: list[PlannedSite] = []
    ranks = ranks_by_policy([said[pack[0].name].rank or rank for pack in packs], curves)
    for pack, layout, curve, r in zip(packs, layouts, curves, ranks, strict=True):
        pack_rows = rows_of(pack, layout, -(-r // multiple_of) * multiple_of)
        why = _too_much(pack_rows, curve.max_rank, allow_unprofitable)
        if why:
            reasons.update(dict.fromkeys((site.name for site in pack), why))
        else:
            rows += pack_rows
    order = {name: i for i, name in enumerate(located)}
    rows.sort(key=lambda row: order[row.site.name])
    left = [site.left_dense(reasons[site.name]) for site in sites if site.name in reasons]
    dense = sorted([*left, *skipped], key=lambda s: order[s.name])
    return Plan(tuple(rows), tuple(dense), total, flops, meta_of(net).get("capture", ""))


def _left_alone(
    sites: Sequence[Site],
    include: Sequence[str],
    exclude: Sequence[str],
    said: Mapping[str, Override],
    roles: Mapping[str, Role],
    leave: Collection[Role],
) -> dict[str, str]:
    """Why sites stay dense by their names or roles. What an override says of a site goes before its role."""
    reasons = {}
    for site in sites:
        if include and not matches(site, include):
            reasons[site.name] = "not among the names to include"
        elif matches(site, exclude):
            reasons[site.name] = "excluded by name"
        elif said[site.name].dense:
            reasons[site.name] = "left alone by name"
        elif roles.get(site.name) in leave and said[site.name] == Override():
            reasons[site.name] = roles[site.name].value
    return reasons


def rows_of(pack: Sequence[Site], layout: Layout, rank: int) -> list[PlannedSite]:
    """The rows of a site by itself, or of the sites of a pack, at a rank."""
    names = tuple(site.name for site in pack) if len(pack) > 1 else ()
    return [PlannedSite(site, layout, rank, names) for site in pack]


def costs_of(pack: Sequence[Site], layout: Layout, totals: Mapping[str, int | None]) -> dict[str, Cost]:
    """What the sites cost by each of the model's totals that is known (``params``, ``flops``), in shares of it.

    A site without FLOPs runs in training only: as in the plan's own total, it counts nothing.
    """

    def share(rows: Sequence[Site | PlannedSite], what: str, total: int) -> float:
        return sum(getattr(row, what) or 0 for row in rows) / total

    def cost(what: str, total: int) -> Cost:
        return Cost(share(pack, what, total), lambda rank: share(rows_of(pack, layout, rank), what, total))

    return {what: cost(what, total) for what, total in totals.items() if total}


def _too_much(rows: Sequence[PlannedSite], limit: int, allow_unprofitable: bool) -> str | None:
    """Why the site, or the pack of sites, should stay dense: its rank is too high, or its factors do not pay."""
    rank, shape = rows[0].rank, "x".join(map(str, rows[0].site.shape))
    if len(rows) > 1:
        shape = f"{len(rows)} weights ({shape}, ...) with one input"
    if rank > limit:
        return f"rank {rank} is over the limit of {limit} for {shape}"
    if allow_unprofitable:
        return None
    costs = [("parameters", sum(row.params for row in rows), sum(row.site.params for row in rows))]
    if all(row.flops is not None for row in rows):
        costs.append(("FLOPs", sum(row.flops or 0 for row in rows), sum(row.site.flops or 0 for row in rows)))
    for what, low, dense in costs:
        # Reading rows costs no FLOPs: what an embedding saves is its table.
        if dense and low >= dense:
            return f"rank {rank} of {shape} would cost no fewer {what} than dense ({low:,} for {dense:,})"
    return None


def _check_patterns(patterns: Sequence[str], candidates: Sequence[Site | Skipped]) -> None:
    for pattern in patterns:
        if not any(matches(candidate, [pattern]) for candidate in candidates):
            known = ", ".join(candidate.name for candidate in candidates[:5]) or "(none)"
            raise PlanError(
                f"the pattern {pattern!r} matches no weight of the model; its weights are named like {known}"
            )


def _check_layouts(overrides: Mapping[str, Override], sites: Sequence[Site]) -> None:
    """A layout may be asked of a pattern that fits other sites too, but not of one that fits no convolution."""
    for pattern, override in overrides.items():
        ops = [site.uses[0].op for site in sites if matches(site, [pattern])]
        if override.layout is not None and not any(isinstance(op, ConvOp | ConvTransposeOp) for op in ops):
            raise PlanError(f"the override of {pattern!r} asks for a layout of convolutions, and fits no convolution")


def break_even_rank(site: Site, layout: Layout) -> tuple[int, int | None]:
    """The largest ranks that cost less than dense: in parameters, and in FLOPs (None without example shapes)."""

    def largest(fits: Any) -> int:
        low, high = 0, layout.max_rank(site.shape)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(PlannedSite(site, layout, middle)) else (low, middle - 1)
        return low

    by_params = largest(lambda row: row.params < site.params)
    by_flops = None if site.flops is None else largest(lambda row: (row.flops or 0) < (site.flops or 0))
    return by_params, by_flops


def fit_plan(net: nn.Module, plan: Plan, example_inputs: Any = None) -> Plan:
    """A given plan for this net: its layouts and ranks, with the sites and costs as found here.

    A site the plan does not list stays dense, and says so. Raises PlanError where the plan names a weight that the net
    does not have, has in another shape, cannot factor, or holds non-finite values in.
    """
    measured = None if example_inputs is None else measure(net, example_inputs)
    sites, skipped = find_sites(net, measured.shapes if measured else None)
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
        rows.append(PlannedSite(here, layout_of(here, row.layout.name), row.rank, row.pack))
    checked_rows(rows)
    flops = measured.flops if measured else None
    if measured is None and [_ops(row) for row in rows] == [_ops(row) for row in plan.sites]:
        # What was measured when the plan was made still holds.
        flops = plan.total_flops
        rows = [
            replace(row, site=replace(row.site, uses=given.site.uses))
            for row, given in zip(rows, plan.sites, strict=True)
        ]
    located = locate(net)
    refuse_non_finite((row.site.name for row in rows), located)
    given = {s.name: s.reason for s in plan.skipped}
    dense = [*skipped, *(s.left_dense(given.get(s.name, "left dense by the given plan")) for s in by_name.values())]
    order = {name: i for i, name in enumerate(located)}
    rows.sort(key=lambda row: order[row.site.name])
    dense.sort(key=lambda s: order[s.name])
    total = sum(p.numel() for p in net.parameters())
    return Plan(tuple(rows), tuple(dense), total, flops, meta_of(net).get("capture", ""))


def _ops(row: PlannedSite) -> list[Op]:
    return [use.op for use in row.site.uses]
