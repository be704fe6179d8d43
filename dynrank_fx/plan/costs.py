"""What sites cost, dense and at each rank: the curves that rank policies choose from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..layouts import Layout, singular_values
from .plan import PlannedSite
from .ranks import Cost, Curve, Metric, rank_grid
from .site import Site


def rows_of(group: Sequence[Site], layout: Layout, rank: int) -> list[PlannedSite]:
    """The rows of a site by itself, or of the sites that share a factor, at a rank."""
    names = tuple(site.name for site in group) if len(group) > 1 else ()
    return [PlannedSite(site, layout, rank, names) for site in group]


def costs_of(group: Sequence[Site], layout: Layout, totals: Mapping[Metric, int | None]) -> dict[Metric, Cost]:
    """What the sites cost by each of the model's totals that is known, in shares of it.

    A site without FLOPs runs in training only: as in the plan's own total, it counts nothing.
    """

    def share(rows: Sequence[Site | PlannedSite], what: Metric, total: int) -> float:
        return sum((row.params if what is Metric.PARAMS else row.flops) or 0 for row in rows) / total

    def cost(what: Metric, total: int) -> Cost:
        return Cost(share(group, what, total), lambda rank: share(rows_of(group, layout, rank), what, total))

    return {what: cost(what, total) for what, total in totals.items() if total}


def break_even_rank(site: Site, layout: Layout) -> tuple[int, int | None]:
    """The largest ranks that cost less than dense: in parameters, and in FLOPs (None without example shapes)."""

    def largest(fits: Callable[[PlannedSite], bool]) -> int:
        low, high = 0, layout.max_rank(site.shape)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(PlannedSite(site, layout, middle)) else (low, middle - 1)
        return low

    by_params = largest(lambda row: row.params < site.params)
    by_flops = None if site.flops is None else largest(lambda row: (row.flops or 0) < (site.flops or 0))
    return by_params, by_flops


def curve_of(
    group: Sequence[Site],
    layout: Layout,
    spectrum: Callable[[], Tensor],
    costs: Mapping[Metric, Cost],
    *,
    multiple_of: int = 1,
    steps: int | None = None,
) -> Curve:
    """What a rank policy may look at, of a site or of those that share a factor.

    spectrum: gives the singular values [g, k] of the weights, one above the other, when asked for. multiple_of, steps:
    of the rank grid.
    """
    shape = (sum(site.shape[0] for site in group), *group[0].shape[1:])
    limit = layout.max_rank(shape)
    grid = rank_grid(limit, multiple_of, steps=steps)
    return Curve(group[0].name, limit, spectrum, layout.matrix_shape(shape), grid, costs)


def spectrum_of(layout: Layout, weights: Sequence[Tensor]) -> Tensor:
    """The singular values [g, k] of weights, one above the other."""
    return singular_values(layout.to_matrix(torch.cat(list(weights)) if len(weights) > 1 else weights[0]))
