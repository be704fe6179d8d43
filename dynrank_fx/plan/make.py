"""Deciding: from a net, a rank policy and name patterns to a Plan; nothing is rewritten here."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import nn

from ..errors import PlanError
from ..layouts import ChannelLayout, ConvLayout, layout_for
from ..ops import ConvOp, ConvTransposeOp
from ..tracing import measure, meta_of
from .costs import costs_of, curve_of, rows_of
from .find import find_sites
from .locate import Located, input_of, locate, refuse_non_finite
from .overrides import Override, checked_conv_layout, override_of
from .plan import Plan, PlannedSite
from .ranks import RankPolicy, checked_policy, ranks_by_policy
from .roles import Role, roles_of
from .site import Site, Skipped, matches

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


def packs_of(
    sites: Sequence[Site], located: Mapping[str, Located], overrides: Mapping[str, Override]
) -> list[list[Site]]:
    """The sites in packs: plain linears of one input, dtype, device and override; any other site by itself."""
    packs: dict[object, list[Site]] = {}
    for site in sites:
        found = located[site.name]
        weight = found.parameter
        inputs = input_of(found)
        alike = (inputs, overrides[site.name], weight.dtype, weight.device, weight.requires_grad)
        packs.setdefault(site.name if inputs is None else alike, []).append(site)
    return list(packs.values())
