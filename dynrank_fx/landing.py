"""A soft landing: before a cut, what it will take away decays to nothing, so that the cut changes nothing.

A weight that trains densely fills its whole spectrum, and truncating it throws away what the network has come to rely
on. So in every few steps of FULL the part of W beyond its coming rank is scaled down,

    W ← (1 − c) W + c W V Vᵀ,        V [n, r] an orthonormal basis of the top right singular vectors,

with c = 1 / (applications left until the cut): what was there at the start falls linearly to zero, what the steps add
since with it, and the dense optimizer moves into the rank-r part what matters. V follows W by one step of subspace
iteration each time. Shapes as in ``lowrank``: W [g, m, n] with n ≤ m, or its transpose.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import lowrank
from .net import unwrap
from .phase import Phase, Schedule, TrainState
from .setting import phases_in
from .switched import Switched, switched_modules
from .twofactors import TwoFactors

EVERY = 5
"""Steps from one application to the next: at rank r it costs about r / (5 · tokens of a batch) of a step."""


class Landing:
    """Hooks on ``optimizer.step()``. ``begin(left)`` at the start of an epoch says for each site how many steps of FULL
    are left until its cut; sites that are not named train as they are.

    ``bases`` holds V by site: part of a checkpoint, so that a resumed run goes on bit by bit.
    """

    def __init__(self, net: nn.Module, optimizer: Optimizer, every: int = EVERY) -> None:
        self._units = _units(net)
        self.every, self.left = every, dict[str, int]()
        self.bases: dict[str, Tensor] = {}
        self._handle = optimizer.register_step_post_hook(self._after)

    def remove(self) -> None:
        """Leave the weights to the optimizer again."""
        self._handle.remove()

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs: steps left and bases by site."""
        return {"left": self.left, "bases": self.bases}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        devices = {unit[0].site: unit[0].outline.device for unit in self._units}
        self.left = dict(state["left"])
        self.bases = {site: V.to(devices[site]) for site, V in state["bases"].items()}

    def begin(self, left: Mapping[str, int]) -> None:
        """Steps of FULL until the cut by site, from now on."""
        self.left = dict(left)
        self.bases = {site: V for site, V in self.bases.items() if site in self.left}

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for unit in self._units:
            site = unit[0].site
            left = self.left.get(site, 0)
            if left <= 0 or unit[0].phase != int(Phase.FULL):
                continue
            self.left[site] = left - 1
            if (left - 1) % self.every == 0:
                self._shrink(unit, 1 / ((left - 1) // self.every + 1))

    @torch.no_grad()
    def _shrink(self, unit: list[Switched], c: float) -> None:
        weights = [module._parameters["weight"] for module in unit]
        stacked = torch.cat([w for w in weights if w is not None]) if len(unit) > 1 else weights[0]
        assert stacked is not None
        layout = unit[0].layout
        W = layout.to_matrix(stacked)
        wide = W.shape[-2] < W.shape[-1]
        with lowrank.full_precision():
            X = (W.mT if wide else W).to(torch.promote_types(W.dtype, torch.float32))
            V = self.bases[unit[0].site] = self._basis(unit[0], X)
            kept = (X @ V) @ V.mT
            X = torch.lerp(X, kept, c)
        new = layout.from_matrix(X.mT if wide else X, tuple(stacked.shape))
        sizes = [module.shape[0] for module in unit]
        for weight, part in zip(weights, new.split(sizes) if len(unit) > 1 else [new], strict=True):
            assert weight is not None
            weight.copy_(part)

    def _basis(self, module: Switched, X: Tensor) -> Tensor:
        """The top right singular vectors [g, n, r] of X: followed from the last ones, or found anew."""
        V = self.bases.get(module.site)
        if V is None or V.shape[-1] != module.rank or V.shape[-2] != X.shape[-1]:
            X = torch.nan_to_num(X, 0.0, 0.0, 0.0)  # diverged: whoever trains will say so, and better
            return lowrank.right_basis(X, module.rank).to(X.dtype).contiguous()
        return torch.linalg.qr(X.mT @ (X @ V)).Q.contiguous()


def _units(net: nn.Module) -> list[list[Switched]]:
    """The first module of every site of two factors, those that share one together, its owner first."""
    # The nearest tensor of a Tucker or CP rank has no basis to follow: such sites are cut as they are.
    sites = {name: modules[0] for name, modules in switched_modules(unwrap(net)).items()}
    firsts = {name: site for name, site in sites.items() if isinstance(site.layout, TwoFactors)}
    units = dict.fromkeys(module.pack or (name,) for name, module in firsts.items())
    return [[firsts[name] for name in unit] for unit in units]


def epochs_to_cut(schedule: Schedule, state: TrainState, phases: Mapping[str, Phase]) -> dict[str, int]:
    """For every site that is FULL now, the epochs until the schedule will cut it, this one counted.

    The schedule is asked ahead, with learning rates as planned, compute as its own answers cost, and spectra as they
    are. Sites that stay FULL to the end, or go on as an ADAPTOR, are left out.
    """
    if state.epochs is None:
        return {}
    waiting = {name for name, phase in phases.items() if phase is Phase.FULL}
    sites = {name: replace(site, phase=phases[name]) for name, site in state.sites.items()}
    spent, found = state.spent, dict[str, int]()
    for ahead in range(1, state.epochs - state.epoch):
        if not waiting:
            break
        epoch = state.epoch + ahead
        lr = state.lrs[epoch] if epoch < len(state.lrs) else state.lr
        spent += 1 - sum(site.dense - site.low for site in sites.values() if site.phase is not Phase.FULL)
        asked = phases_in(schedule(replace(state, epoch=epoch, lr=lr, spent=spent, sites=sites)), sites)
        cut = {name for name in waiting if asked.get(name, Phase.FULL) is not Phase.FULL}
        waiting -= cut
        found |= {name: ahead for name in sorted(cut) if asked[name] is Phase.LOW}
        sites |= {name: replace(sites[name], phase=phase) for name, phase in asked.items()}
    return found
