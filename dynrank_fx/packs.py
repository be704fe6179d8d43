"""Sites that read the same input (query, key and value; gate and up) and may share one right factor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from . import lowrank
from .layout import Layout
from .locate import Located, input_of
from .overrides import Override
from .ranks import Cost, Curve
from .sites import Site


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


def curve_of(
    pack: Sequence[Site], layout: Layout, located: Mapping[str, Located], rungs: int, costs: Mapping[str, Cost]
) -> Curve:
    """What a rank policy may look at: of a pack, the matrix of all its weights, one above the other.

    rungs: ranks are multiples of it.
    """
    weights = [located[site.name].parameter.detach() for site in pack]
    shape = (sum(site.shape[0] for site in pack), *pack[0].shape[1:])

    def spectrum() -> torch.Tensor:
        return lowrank.singular_values(layout.to_matrix(torch.cat(weights) if len(weights) > 1 else weights[0]))

    limit = layout.max_rank(shape)
    ranks = () if rungs == 1 else (*range(rungs, limit, rungs), limit)
    return Curve(pack[0].name, limit, spectrum, layout.matrix_shape(shape), ranks, costs)
