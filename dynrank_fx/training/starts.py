"""Where cuts begin: what is known of a weight's right singular vectors before it is cut, so that the cut costs less.

A site that goes from LOW to FULL leaves the span of its factors behind, and one that lands has the bases of its last
application. Neither decides what a cut gives beyond its rounding: layouts prove that what they made of it is as good as
a cut from nothing. But it does decide the rounding, so that it is part of a checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..aliases import StateDict
from ..errors import StoreError
from ..layouts import Factors, Layout
from ..phase import Phase
from ..rewrite import site_groups
from .landing import Landing


class Starts:
    """What the next cuts of a net's sites begin with.

    Args:
        landing: The landing of its sites, whose bases come first.
    """

    def __init__(self, landing: Landing | None = None) -> None:
        self._landing = landing
        self._left: dict[str, Factors] = {}

    @staticmethod
    @torch.no_grad()
    def of_factors(net: nn.Module, names: Iterable[str]) -> dict[str, Factors]:
        """What those of these sites that are in LOW would leave behind.

        Args:
            net: What ``transform`` made.
            names: Sites, by the first of those that share a factor.

        Returns:
            By site; in bfloat16, which a start is exact enough in and takes half the memory.
        """
        known = {}
        for group in site_groups(net, names):
            if group.owner.phase == int(Phase.LOW):
                lefts = [module.factors[0].detach() for module in group.firsts]
                others = [factor.detach() for factor in group.owner.factors[1:]]
                start = group.layout.start((torch.cat(lefts) if group.shared else lefts[0], *others))
                known[group.name] = tuple(each.to(torch.bfloat16, copy=True) for each in start)
        return {name: start for name, start in known.items() if start}

    def switched(self, phases: Mapping[str, Phase], left: Mapping[str, Factors]) -> None:
        """After a switch: keep what sites that are FULL now have left, and forget that of the others.

        Args:
            phases: What every site is in now.
            left: What ``of_factors`` gave before.
        """
        known = {**self._left, **left}
        self._left = {name: start for name, start in known.items() if phases.get(name) is Phase.FULL}

    def split(self, sites: Sequence[str], layout: Layout, weight: Tensor, rank: int) -> Factors | None:
        """Factors of a weight, found from what is known of it; None where nothing is.

        Args:
            sites: The site, or those that share a factor.
            layout: Its layout.
            weight: The weight, or the weights one above the other.
            rank: The rank.

        Returns:
            What ``layout.split`` gives.
        """
        landed = {} if self._landing is None else self._landing.bases
        last = landed.get(sites[0]) or self._left.get(sites[0])
        return layout.split(weight, rank, last) if last else None

    def state(self) -> StateDict:
        """What a checkpoint needs."""
        return dict(self._left)

    def load(self, state: StateDict) -> None:
        """Go on from there. Raises StoreError for a state that is of something else."""
        sound = isinstance(state, Mapping) and all(
            isinstance(start, list | tuple) and all(isinstance(each, Tensor) for each in start)
            for start in state.values()
        )
        if not sound:
            raise StoreError("the state of where cuts begin is damaged: give an earlier copy")
        self._left = {name: tuple(start) for name, start in state.items()}
