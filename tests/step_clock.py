"""A clock that a test sets, for what sites take in a training step."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import dynrank_fx as dr
from dynrank_fx.plan import PlannedSite
from dynrank_fx.timing import Pair


class Said(dr.StepTimes):
    """The time of factors over dense, by rank; by default 0.5. The dense one takes 1 ms. whole: times of the model."""

    def __init__(
        self, ratios: dict[int, float] | None = None, other: float = 0.5, whole: Pair | None = None, **kwargs: Any
    ) -> None:
        super().__init__(cache=None, **kwargs)
        self.ratios, self.other, self.of_whole = ratios or {}, other, whole
        self.asked: list[PlannedSite] = []

    def _measured(self, rows: Any) -> Pair | None:
        self.asked += rows
        ratio = self.ratios.get(rows[0].rank, self.other)
        return Pair(1e-3, ratio * 1e-3, ratio)

    def _measured_whole(self, net: Any, low: Any, inputs: Any) -> Pair | None:
        return self.of_whole


def planned(times: dr.StepTimes, rank: int = 30, size: int = 200, **choices: Any) -> dr.Plan:
    model = nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, size))
    return dr.plan_of(
        dr.transform(model, (torch.zeros(4, size),), rank=dr.Fixed(rank), times=times, allow_empty=True, **choices)
    )
