"""What sites cost, dense and at each rank: the curves that rank policies choose from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..layouts import Layout, singular_values
from .locate import Located
from .plan import PlannedSite
from .ranks import Cost, Curve
from .site import Site


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


def curve_of(
    pack: Sequence[Site], layout: Layout, located: Mapping[str, Located], rungs: int, costs: Mapping[str, Cost]
) -> Curve:
    """What a rank policy may look at: of a pack, the matrix of all its weights, one above the other.

    rungs: ranks are multiples of it.
    """
    weights = [located[site.name].parameter.detach() for site in pack]
    shape = (sum(site.shape[0] for site in pack), *pack[0].shape[1:])

    def spectrum() -> torch.Tensor:
        return singular_values(layout.to_matrix(torch.cat(weights) if len(weights) > 1 else weights[0]))

    limit = layout.max_rank(shape)
    ranks = () if rungs == 1 else (*range(rungs, limit, rungs), limit)
    return Curve(pack[0].name, limit, spectrum, layout.matrix_shape(shape), ranks, costs)
