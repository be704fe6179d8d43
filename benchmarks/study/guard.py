"""What the study asks of a guard: does it help to keep the spectral norm of a weight from growing after a switch?"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from dynrank_fx.phase import Phase
from dynrank_fx.rewrite import switched_modules

STEPS = 50
"""How long after a switch the norm is held."""


class SpectralGuard:
    """A hook on ``optimizer.step()``: for STEPS steps after a site's switch, ‖W‖₂ may not exceed what it was at it.

    ``grown`` collects by how much the norm of each site would have grown in a step over that, where it would.
    """

    def __init__(self, net: nn.Module, optimizer: Optimizer) -> None:
        self._sites = {name: modules[0] for name, modules in switched_modules(net).items()}
        self._phases = {name: site.phase for name, site in self._sites.items()}
        self._held: dict[str, tuple[float, int]] = {}
        self.grown: list[float] = []
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)

    def _before(self, *_: Any) -> None:
        for name, site in self._sites.items():
            if site.phase != self._phases[name]:
                self._phases[name] = site.phase
                self._held[name] = (float(site.spectrum().max()), STEPS)

    @torch.no_grad()
    def _after(self, *_: Any) -> None:
        for name, (limit, left) in list(self._held.items()):
            site = self._sites[name]
            growth = float(site.spectrum().max()) / limit
            if growth > 1:
                self.grown.append(growth)
                tensors = [site.weight] if site.phase == int(Phase.FULL) else list(site.factors)
                for tensor in tensors:
                    tensor.mul_(growth ** (-1 / len(tensors)))
            if left == 1:
                del self._held[name]
            else:
                self._held[name] = (limit, left - 1)
