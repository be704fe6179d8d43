"""A soft landing: before a cut, what it will take away decays to nothing, so that the cut changes nothing.

A weight that trains densely fills its whole spectrum, and truncating it throws away what the network has come to rely
on. So in every few steps of FULL the part of W that the coming cut would not keep is scaled down,

    W ← (1 − c) W + c K,        K what the cut keeps: W V Vᵀ for two factors, V the top right singular vectors,

with c = 1 / (applications left until the cut): what was there at the start falls linearly to zero, what the steps add
since with it, and the dense optimizer moves into the kept part what matters. K follows W by one step of an iteration
each time, see ``followed`` of the layouts.

Sources: the rule and its linear course are this project's. That low rank belongs into dense training, before the cut,
is older: TRP (arXiv 2004.14566) puts a truncation between every few of its steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn
from torch.optim import Optimizer

from ..aliases import StateDict
from ..errors import StoreError
from ..layouts import Factors, at_least_float32, full_precision
from ..phase import Phase
from ..phases import Optimizers, optimizers_in, phases_in
from ..processes import is_part, own, part_as
from ..rewrite import SiteGroup, site_groups
from ..schedules import Schedule, TrainState
from .deciding import asked_of

EVERY = 5
"""Steps from one application to the next: at rank r it costs about r / (5 · rows of a batch) of a step."""


class Landing:
    """Hooks on ``optimizer.step()`` that prepare the sites of a net for their cuts.

    Args:
        net: What ``transform`` made.
        optimizer: The optimizer over its parameters, or all of them: a weight is prepared after the steps of its own.
        every: Steps from one application to the next.

    Attributes:
        bases: What tells K, by site: part of a checkpoint, so that a resumed run goes on bit by bit.
        left: Steps of FULL until the cut, by site.
    """

    def __init__(self, net: nn.Module, optimizer: Optimizers, every: int = EVERY) -> None:
        self._groups = site_groups(net)
        self.every, self.left = every, dict[str, int]()
        self.bases: dict[str, Factors] = {}
        optimizers = optimizers_in(optimizer)
        self._several = len(optimizers) > 1
        self._handles = [each.register_step_post_hook(self._after) for each in optimizers]

    def remove(self) -> None:
        """Leave the weights to the optimizer again."""
        for handle in self._handles:
            handle.remove()

    def state(self) -> StateDict:
        """What a checkpoint needs: steps left and bases by site."""
        return {"left": self.left, "bases": self.bases}

    def load(self, state: StateDict) -> None:
        """Go on from there. Raises StoreError for a state that is of something else."""
        devices = {group.name: group.owner.outline.device for group in self._groups}
        try:
            left = {site: int(steps) for site, steps in state["left"].items()}
            bases = {site: tuple(each.to(devices[site]) for each in basis) for site, basis in state["bases"].items()}
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise StoreError("the state of the landing is of another net, or damaged: give an earlier copy") from error
        self.left, self.bases = left, bases

    def begin(self, left: Mapping[str, int]) -> None:
        """Steps of FULL until the cut by site, from now on."""
        self.left = dict(left)
        self.bases = {site: basis for site, basis in self.bases.items() if site in self.left}

    def _after(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        self.step(optimizer)

    def step(self, optimizer: Optimizer) -> None:
        """After a step of the optimizer, or one that was skipped, which brings the cut as near.

        Args:
            optimizer: The one whose weights are prepared.
        """
        held = {id(p) for group in optimizer.param_groups for p in group["params"]} if self._several else None
        for group in self._groups:
            left = self.left.get(group.name, 0)
            if left <= 0 or group.owner.phase != int(Phase.FULL):
                continue
            if held is not None and id(group.owner._parameters["weight"]) not in held:
                continue
            self.left[group.name] = left - 1
            if (left - 1) % self.every == 0:
                self._shrink(group, 1 / ((left - 1) // self.every + 1))

    @torch.no_grad()
    def _shrink(self, group: SiteGroup, c: float) -> None:
        stacked = group.weight
        # Diverged: whoever trains will say so, and better.
        W = torch.nan_to_num(at_least_float32(stacked), 0.0, 0.0, 0.0)
        with full_precision():
            last = self.bases.get(group.name, ())
            kept, self.bases[group.name] = group.layout.followed(W, group.owner.rank, last)
            new = torch.lerp(at_least_float32(stacked), kept, c)
        sizes = [module.shape[0] for module in group.firsts]
        for module, part in zip(group.firsts, new.split(sizes) if group.shared else [new], strict=True):
            weight = module._parameters["weight"]
            assert weight is not None
            own(weight).copy_(own(part_as(part, weight)) if is_part(weight) else part)


def epochs_to_cut(schedule: Schedule, state: TrainState, phases: Mapping[str, Phase]) -> dict[str, int]:
    """For every site that is FULL now, the epochs until the schedule will cut it, this one counted.

    The schedule is asked ahead, with learning rates as planned, compute as its own answers cost, and spectra as they
    are. Sites that stay FULL to the end, or go on as an ADAPTOR, are left out.
    """
    if state.epochs is None:
        return {}
    waiting = {name for name, phase in phases.items() if phase is Phase.FULL}
    sites = {name: replace(site, phase=phases[name]) for name, site in state.sites.items()}
    spent, due = state.spent, dict[str, int]()
    for ahead in range(1, state.epochs - state.epoch):
        if not waiting:
            break
        epoch = state.epoch + ahead
        lr = state.lrs[epoch] if epoch < len(state.lrs) else state.lr
        spent += 1 - sum(site.dense - site.low for site in sites.values() if site.phase is not Phase.FULL)
        asked = phases_in(asked_of(schedule, replace(state, epoch=epoch, lr=lr, spent=spent, sites=sites)), sites)
        cut = {name for name in waiting if asked.get(name, Phase.FULL) is not Phase.FULL}
        waiting -= cut
        due |= {name: ahead for name in sorted(cut) if asked[name] is Phase.LOW}
        sites |= {name: replace(sites[name], phase=phase) for name, phase in asked.items()}
    return due
