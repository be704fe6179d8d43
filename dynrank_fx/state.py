"""What a schedule is told: where training stands, what the sites cost, and their spectra when it looks at them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from .lrplan import planned_rates
from .net import unwrap
from .phase import Phase, SiteState, TrainState
from .plan import PlannedSite
from .rewrite import plan_of
from .switched import switched_modules
from .transition import phases_of


def train_state(
    net: nn.Module,
    optimizer: Optimizer,
    epoch: int,
    epochs: int,
    lr_scheduler: Any = None,
    *,
    steps_per_epoch: int = 1,
    rates: Sequence[float] = (),
    spent: float = 0.0,
) -> TrainState:
    """The state of a training at the start of an epoch, for a schedule to look at.

    lr_scheduler: stepped once an epoch, or as often as steps_per_epoch says. rates: the learning rates of the epochs so
    far. spent: the sum of ``cost_of`` over them. Spectra are computed when they are asked for.
    """
    plan, phases = plan_of(net), phases_of(net)
    sites = {}
    for row in plan.sites:
        dense, low = _costs(row, plan.total_flops, plan.total_params)
        groups = row.site.params // math.prod(row.layout.matrix_shape(row.site.shape))
        sites[row.site.name] = SiteState(phases[row.site.name], row.rank, dense, low, groups, row.pack)
    planned = planned_rates(optimizer, lr_scheduler, epochs - epoch, steps_per_epoch)
    known = (*rates, *planned) if planned and len(rates) == epoch else ()
    lr = float(optimizer.param_groups[0]["lr"])
    return TrainState(epoch, epochs, lr, _Spectra(net), spent, known, sites)


def cost_of(net: nn.Module) -> float:
    """What a step costs in the present setting, by FLOPs (parameters where those are unknown), with the dense model
    as 1.

    The base of an ADAPTOR takes two of the three products of a dense step, which needs no gradient of it.
    """
    plan, phases = plan_of(net), phases_of(net)
    more = 0.0
    for row in plan.sites:
        dense, low = _costs(row, plan.total_flops, plan.total_params)
        more += {Phase.FULL: 0.0, Phase.LOW: low - dense, Phase.ADAPTOR: low - dense / 3}[phases[row.site.name]]
    return 1 + more


def _costs(row: PlannedSite, total_flops: int | None, total_params: int) -> tuple[float, float]:
    """What a site costs dense and factored, in shares of the model. One without FLOPs runs in training only: as in the
    plan's own total, it counts nothing.
    """
    if total_flops:
        return (row.site.flops or 0) / total_flops, (row.flops or 0) / total_flops
    return row.site.params / total_params, row.params / total_params


class _Spectra(Mapping[str, tuple[float, ...]]):
    """Singular values by site, computed when a schedule looks at them."""

    def __init__(self, net: nn.Module) -> None:
        self._sites = switched_modules(unwrap(net))
        self._known: dict[str, tuple[float, ...]] = {}

    def __getitem__(self, name: str) -> tuple[float, ...]:
        if name not in self._known:
            values = self._sites[name][0].spectrum().flatten().sort(descending=True).values
            self._known[name] = tuple(values.tolist())
        return self._known[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)
