"""Deciding: from a net, a rank policy and name patterns to a Plan; nothing is rewritten here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Unpack

from torch import nn

from ..errors import PlanError
from ..layouts import layout_for
from ..ops import OP_MODULES, ConvolutionOp
from ..tracing import ExampleInputs, is_captured, measure, meta_of, unwrap
from .by_time import by_time
from .costs import costs_of, curve_of, rows_of, spectrum_of
from .find import find_sites, why_not
from .locate import Located, input_of, locate, refuse_non_finite
from .options import PlanChoices, PlanOptions, chosen
from .overrides import Override, override_of
from .plan import Plan, PlannedSite
from .ranks import Metric, RankPolicy, ranks_by_policy
from .roles import Role, roles_of
from .site import Site, Skipped, matches
from .step_times import StepTimes


def make_plan(
    net: nn.Module,
    options: PlanOptions | RankPolicy | None = None,
    example_inputs: ExampleInputs | None = None,
    **choices: Unpack[PlanChoices],
) -> Plan:
    """Decide on data, before anything is rewritten: ranks for every site that may be factored and pays.

    Args:
        net: What ``capture`` made.
        options: Every choice of planning, or the rank policy alone.
        example_inputs: A tuple of positional arguments, a dict of keyword arguments, or the pair ``(args, kwargs)``;
            without them FLOPs are not counted.
        **choices: Fields of ``PlanOptions`` that are chosen otherwise.

    Returns:
        The plan: the sites with their layouts and ranks, and of every other matrix the reason why it stays dense.

    Raises:
        PlanError: For a pattern that matches nothing, a rank that no site can have, non-finite weights, and a model
            that was not captured.
    """
    if not is_captured(unwrap(net)):
        raise PlanError(f"{type(net).__name__} was not captured: give what capture(model, inputs) makes of it")
    if options is not None and not isinstance(options, PlanOptions):
        choices, options = {"rank": options, **choices}, None
    return plan_by(net, chosen(options, choices), example_inputs)


def plan_by(
    net: nn.Module,
    options: PlanOptions,
    example_inputs: ExampleInputs | None,
    located: Mapping[str, Located] | None = None,
    graph: Mapping[str, Located] | None = None,
    times: StepTimes | None = None,
) -> Plan:
    """As ``make_plan``, by options that are settled.

    located: what ``locate`` found in the net, if known already. graph: what it found in a graph of the same model: that
    tells the roles of the weights, and which of them read one input, where the net is none.
    """
    located = locate(net) if located is None else located
    measured = None if example_inputs is None else measure(net, example_inputs)
    sites, skipped = find_sites(net, measured.shapes if measured else None, located)
    skipped = tuple(_by_the_graph(each, located[each.name], graph) for each in skipped)
    _check_patterns([*options.include, *options.exclude, *options.overrides], [*sites, *skipped])
    said = {site.name: override_of(site, options.overrides) for site in sites}
    _check_layouts(options.overrides, sites)
    reasons = _left_alone(sites, options, said, roles_of(graph or located) if options.leave else {})
    free = [site for site in sites if site.name not in reasons]
    refuse_non_finite((site.name for site in free), located)
    groups = sharing_groups(free, located, said, graph) if options.share_inputs else [[site] for site in free]
    layouts = [layout_for(group[0].uses[0].op, said[group[0].name].layout or options.conv_layout) for group in groups]
    total, flops = sum(p.numel() for p in net.parameters()), measured.flops if measured else None
    totals = {Metric.PARAMS: total, Metric.FLOPS: flops}
    curves = [
        curve_of(
            group,
            layout,
            partial(spectrum_of, layout, [located[site.name].parameter.detach() for site in group]),
            costs_of(group, layout, totals),
            multiple_of=options.multiple_of,
        )
        for group, layout in zip(groups, layouts, strict=True)
    ]
    at_work = None if times is None else _AtWork(net, times, example_inputs, located)
    rows: list[PlannedSite] = []
    ranks = ranks_by_policy([said[group[0].name].rank or options.rank for group in groups], curves)
    for group, layout, curve, r in zip(groups, layouts, curves, ranks, strict=True):
        rank = -(-r // options.multiple_of) * options.multiple_of
        found = _paying(rows_of(group, layout, rank), curve.max_rank, options, at_work)
        if isinstance(found, str):
            reasons.update(dict.fromkeys((site.name for site in group), found))
        else:
            rows += found
    if times is not None:
        times.save()
    order = {name: i for i, name in enumerate(located)}
    rows.sort(key=lambda row: order[row.site.name])
    left = [site.left_dense(reasons[site.name]) for site in sites if site.name in reasons]
    dense = sorted([*left, *skipped], key=lambda s: order[s.name])
    return Plan(tuple(rows), tuple(dense), total, flops, meta_of(net).get("capture", ""), str(times or ""))


class _AtWork:
    """The uses of sites at the shapes of a training batch, to be timed."""

    def __init__(
        self,
        net: nn.Module,
        times: StepTimes,
        example_inputs: ExampleInputs | None,
        located: Mapping[str, Located],
    ) -> None:
        inputs = example_inputs if times.inputs is None else times.inputs
        if inputs is None:
            raise PlanError("sites are timed at the shapes of their inputs: give example inputs")
        sites, _ = find_sites(net, measure(net, inputs).shapes, located)
        self.times, self._uses = times, {site.name: site.uses for site in sites}

    def found(self, rows: list[PlannedSite], limit: int, options: PlanOptions) -> list[PlannedSite] | str:
        """The rows as ``by_time`` has them, whose own uses are those on the example inputs."""
        real = {row.site.name: row.site for row in rows}

        def pays(rows: Sequence[PlannedSite]) -> bool:
            return _too_much([replace(row, site=real[row.site.name]) for row in rows], limit, False) is None

        timed = [replace(row, site=replace(row.site, uses=self._uses[row.site.name])) for row in rows]
        found = by_time(timed, self.times, options.multiple_of, limit, pays)
        return found if isinstance(found, str) else [replace(row, site=real[row.site.name]) for row in found]


def _paying(
    rows: list[PlannedSite], limit: int, options: PlanOptions, at_work: _AtWork | None
) -> list[PlannedSite] | str:
    """The rows of a site, or of those that share a factor, or why it stays dense."""
    why = _too_much(rows, limit, options.allow_unprofitable)
    if why is not None:
        return why
    return rows if at_work is None or options.allow_unprofitable else at_work.found(rows, limit, options)


def _by_the_graph(skipped: Skipped, here: Located, graph: Mapping[str, Located] | None) -> Skipped:
    """With the way to reach it, where a graph of the model could factor it; with the graph's reason, where that could
    not and the model's own code, which nobody looks into here, is all that uses it.
    """
    matrix = None if graph is None else graph.get(skipped.name)
    if matrix is None:
        return skipped
    reason = why_not(matrix)
    if reason is None:
        return replace(
            skipped,
            reason="only a graph reaches it: how=Capture.EXPORT in place of form=Form.LAYERS factors it",
        )
    own_code = not here.uses and not any(isinstance(module, OP_MODULES) for _, module in here.closed)
    return replace(skipped, reason=reason) if own_code else skipped


def _left_alone(
    sites: Sequence[Site], options: PlanOptions, said: Mapping[str, Override], roles: Mapping[str, Role]
) -> dict[str, str]:
    """Why sites stay dense by their names or roles. What an override says of a site goes before its role."""
    reasons = {}
    for site in sites:
        if options.include and not matches(site, options.include):
            reasons[site.name] = "not among the names to include"
        elif matches(site, options.exclude):
            reasons[site.name] = "excluded by name"
        elif said[site.name].dense:
            reasons[site.name] = "left alone by name"
        elif roles.get(site.name) in options.leave and said[site.name] == Override():
            reasons[site.name] = roles[site.name].value
    return reasons


def _too_much(rows: Sequence[PlannedSite], limit: int, allow_unprofitable: bool) -> str | None:
    """Why the site, or the sites that share a factor, stay dense: the rank is too high, or factors do not pay."""
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
        if override.layout is not None and not any(isinstance(op, ConvolutionOp) for op in ops):
            raise PlanError(f"the override of {pattern!r} asks for a layout of convolutions, and fits no convolution")


def sharing_groups(
    sites: Sequence[Site],
    located: Mapping[str, Located],
    overrides: Mapping[str, Override],
    graph: Mapping[str, Located] | None = None,
) -> list[list[Site]]:
    """The sites that share a right factor together: plain linears of one input, dtype, device and override; any other
    site by itself. graph: tells the inputs of the layers that the model's own code calls.
    """
    groups: dict[object, list[Site]] = {}
    for site in sites:
        weight = located[site.name].parameter
        matrix = (graph or {}).get(site.name) if site.by_code else located[site.name]
        inputs = None if matrix is None else input_of(matrix)
        alike = (inputs, site.by_code, overrides[site.name], weight.dtype, weight.device, weight.requires_grad)
        groups.setdefault(site.name if inputs is None else alike, []).append(site)
    return list(groups.values())
