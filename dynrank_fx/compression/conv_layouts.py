"""Which channels of a convolution are cut: those that it gives or those that it reads.

Both layouts are a 1×1 convolution beside the kernel, and which of them loses less is a matter of the layer: one with
1024 inputs and 128 outputs may need all outputs and few of the inputs. So what each loses at the same cost is compared,
on data where there are any: as the sum over the places of the kernel, as if these were apart.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from torch import nn

from ..errors import CalibrationError
from ..layouts import ChannelLayout, InputLayout
from ..phases import rank_units
from ..plan import Curve, Metric, PlanOptions, override_of
from ..processes import ALONE, Processes
from ..rewrite import plan_of, set_layouts_
from ..tracing import ExampleInputs
from .calibration import calibrated
from .covariance import Calibration

T = TypeVar("T")

_SHARE = 0.25  # of the dense cost, where what is lost is compared


def choose_conv_layouts_(
    net: nn.Module,
    options: PlanOptions,
    data: Sequence[ExampleInputs] | None = None,
    known: Calibration | None = None,
    processes: Processes = ALONE,
) -> Calibration | None:
    """Give those convolutions the input layout that lose less by it, and tell what is then known of all sites.

    net: in FULL. options: a layout that they ask for stays. known: of the net in the channel layout; None for cuts by
    plain SVD.
    """
    if options.conv_layout is not ChannelLayout:
        return known
    channel: dict[str, ChannelLayout] = {
        row.site.name: row.layout
        for row in plan_of(net).sites
        if isinstance(row.layout, ChannelLayout) and math.prod(row.site.shape[2:]) > 1
        if override_of(row.site, options.overrides).layout is None
    }
    if not channel:
        return known
    by_outputs = _lost(net, channel, known, processes)
    set_layouts_(net, {name: InputLayout(layout.groups) for name, layout in channel.items()})
    other = None if data is None else calibrated(net, data, list(channel), processes=processes)
    by_inputs = _lost(net, channel, other, processes)
    back = {name: layout for name, layout in channel.items() if not by_inputs[name] < by_outputs[name]}
    set_layouts_(net, back)
    if known is None or other is None:
        return known
    changed = channel.keys() - back.keys()
    return replace(
        known,
        covariances=_merged(known.covariances, other.covariances, changed),
        plain=_merged(known.plain, other.plain, changed),
    )


def _merged(one: Mapping[str, T], other: Mapping[str, T], of_other: Collection[str]) -> dict[str, T]:
    kept = {name: value for name, value in one.items() if name not in of_other}
    return kept | {name: value for name, value in other.items() if name in of_other}


def _lost(net: nn.Module, names: Collection[str], known: Calibration | None, processes: Processes) -> dict[str, float]:
    """By site, the energy that a cut to the same share of its cost takes away."""

    def lost() -> dict[str, float]:
        units = rank_units(net, spectrum=None if known is None else known.spectrum)
        return {unit.names[0]: _beyond(unit.curve) for unit in units if unit.names[0] in names}

    return processes.from_one(0, lost, CalibrationError, "choosing the layouts")


def _beyond(curve: Curve) -> float:
    cost = curve.costs.get(Metric.FLOPS) or curve.costs[Metric.PARAMS]
    ranks = [rank for rank in range(1, curve.max_rank + 1) if cost.at(rank) <= _SHARE * cost.dense]
    return float(curve.spectrum().square()[..., max(ranks, default=0) :].sum())
