"""Cuts of a net to a budget, of which the one counts whose outputs come nearest to the dense model's.

A budget needs to know what an error in each site does to the model. That is measured with one site cut at a time, and
holds only as far as such errors add up, which at small sizes they do not. So several answers are tried: ranks by these
sensitivities at a quarter of the rank, by those at the ranks first found, by none, and one ratio for all. Each is cut
and run on the calibration data. Of several processes the first decides, on what all have measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor, nn

from ..errors import CalibrationError
from ..phases import LatencyOf, RankUnit, rank_units
from ..plan import Budget, RankPolicy
from ..processes import ALONE, Processes
from ..rewrite import a_twin, inline_, plan_of
from ..tracing import ExampleInputs, batch_size, same_buffers, split_inputs
from .batches import call, dealt
from .batchnorms import Statistics, observed, recalibrated_
from .covariance import Calibration
from .recover import distance
from .targets import Targets, by_batch
from .truncation import Cut, added_biases, apply_ranks_, ranks_of

Ranks: TypeAlias = dict[str, int | None]
"""By site; None where it is dense."""

_PROBES = 4  # batches that the cuts are compared on
_EXAMPLES = 16  # of these, so many tell what an error in one site does


@dataclass(frozen=True)
class Candidate:
    """An ordinary module in evaluation mode, its batch norms recalibrated, and what became of each site."""

    module: nn.Module
    cuts: tuple[Cut, ...]


def _params(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@dataclass
class Candidates:
    """Cuts of one net, dense in evaluation mode, and of what ``inline`` makes of it.

    data, known: calibration batches and what they tell of the net; None for cuts by plain SVD. latency: measured times
    of sites, see ``rank_units``. sequential: as in ``truncate``. low: ranks of the weights that were factored before.
    tell: is told what is tried. processes: those that try them together, each on its own data.
    """

    net: nn.Module
    dense: nn.Module
    data: Sequence[ExampleInputs] | None = None
    known: Calibration | None = None
    latency: LatencyOf | None = None
    multiple_of: int = 1
    sequential: bool = False
    low: Mapping[str, int] = field(default_factory=dict)
    tell: Callable[[str], None] = lambda said: None
    processes: Processes = ALONE
    _measured: dict[tuple[str, int], float] = field(default_factory=dict)
    _spectra: dict[str, Tensor | None] = field(default_factory=dict)
    _observed: list[Statistics] | None = None

    def best(self, policy: RankPolicy, margin: float | None = None) -> Candidate:
        """The cut by a policy. margin: see ``rank_units``; None where a site need not be faster than dense."""
        if not isinstance(policy, Budget) or self.data is None:
            return self.cut(self.ranks(policy, margin, {}))
        tried: set[tuple[int | None, ...]] = set()
        least, nearest = math.inf, None

        def attempt(budget: Budget, weights: Mapping[str, float]) -> None:
            nonlocal least, nearest
            ranks = self.ranks(budget, margin, weights)
            if (key := tuple(ranks.values())) in tried:
                return
            tried.add(key)
            candidate = self.cut(ranks)
            far = self._distance(candidate)
            if nearest is None or far < least:
                least, nearest = far, candidate
            share = _params(candidate.module) / max(_params(self.dense), 1)
            off = f"outputs {far:.3g} off (best so far {least:.3g})"
            self.tell(f"candidate {len(tried)}: {share:.1%} of the parameters, {off}")

        attempt(policy, {})
        attempt(replace(policy, even=True), {})
        attempt(policy, self.sensitivities({}))
        assert nearest is not None
        attempt(policy, self.sensitivities({cut.site: cut.rank for cut in nearest.cuts}))
        return nearest

    def ranks(self, policy: RankPolicy, margin: float | None, weights: Mapping[str, float]) -> Ranks:
        """What the policy says. weights: see ``sensitivities``."""

        def decided() -> Ranks:
            units = self._units(latency=self.latency, margin=margin, weights=weights)
            return ranks_of(self.net, policy, self.known, units)

        return self.processes.from_one(0, decided, CalibrationError, "choosing the ranks")

    def cut(self, ranks: Ranks) -> Candidate:
        """The net at these ranks."""
        return self._cut(ranks, self.data, self.sequential)

    def sensitivities(self, at: Mapping[str, int | None]) -> dict[str, float]:
        """By first site, what an error of all its energy does to the model's outputs: measured with that site alone
        cut to a rank, over the share of its own outputs that this takes away. at: the ranks; by default, and for sites
        that are dense, a quarter.
        """
        with self.processes.all_or_none(CalibrationError, "looking at the spectra"):
            units = self._units()
            ranks = [at.get(unit.names[0]) or max(1, unit.curve.max_rank // 4) for unit in units]
            energies = [unit.curve.spectrum().square().sum(0) for unit in units]
        effects, where = {}, "at the ranks of the best so far" if at else "at a quarter of the rank"
        for number, (unit, rank, energy) in enumerate(zip(units, ranks, energies, strict=True)):
            if number % max(1, -(-len(units) // 3)) == 0:
                self.tell(
                    f"measuring what an error in a weight does to the outputs, {where}: {number + 1} of {len(units)}"
                )
            lost = float(energy[rank:].sum() / energy.sum().clamp_min(1e-30))
            effects[unit.names[0]] = self._moved(unit, rank) / max(lost, 1e-6)
        return effects

    def _units(
        self,
        *,
        latency: LatencyOf | None = None,
        margin: float | None = None,
        weights: Mapping[str, float] | None = None,
    ) -> list[RankUnit]:
        extra = {} if self.known is None else added_biases(self.net, self.known)
        return rank_units(
            self.net,
            multiple_of=self.multiple_of,
            spectrum=self._spectrum,
            extra=extra,
            known=self.low,
            latency=latency,
            margin=margin,
            weights=weights or {},
        )

    def _spectrum(self, site: str, weight: Tensor) -> Tensor | None:
        if site not in self._spectra:
            self._spectra[site] = None if self.known is None else self.known.spectrum(site, weight)
        return self._spectra[site]

    def _cut(
        self, ranks: Mapping[str, int | None], data: Sequence[ExampleInputs] | None, sequential: bool
    ) -> Candidate:
        with self.processes.all_or_none(CalibrationError, "a cut"):
            twin = a_twin(self.net)
        cuts = apply_ranks_(twin, ranks, self.known, data if sequential else None, self.processes)
        with self.processes.all_or_none(CalibrationError, "a cut"):
            module = inline_(twin, layers=True)
        if data is not None and any(cut.loses for cut in cuts):
            recalibrated_(module, data, self._dense_statistics(data), self.processes)
        return Candidate(module, tuple(cuts))

    def _dense_statistics(self, data: Sequence[ExampleInputs]) -> list[Statistics]:
        """What reaches the dense model's batch norms, which every cut is compared with."""
        if self._observed is None:
            self._observed = observed(self.dense, data, self.processes)
        return self._observed

    def _moved(self, unit: RankUnit, rank: int) -> float:
        """How far the outputs move when these sites alone are cut to a rank."""
        assert self.data is not None
        key = (unit.names[0], rank)
        if key not in self._measured:
            ranks = {row.site.name: rank if row.site.name in unit.names else None for row in plan_of(self.net).sites}
            module = self._cut(ranks, None, sequential=False).module
            self._measured[key] = self._apart(module, self._few)
        return self._measured[key]

    @cached_property
    def _probes(self) -> list[ExampleInputs]:
        """The first calibration batches."""
        assert self.data is not None
        return dealt(self.data, _PROBES, self.processes)

    @cached_property
    def _targets(self) -> Targets:
        return Targets(self.dense, self._probes)

    @cached_property
    def _few(self) -> Targets:
        """Of the fewest probes that have enough examples. Both sides go by the statistics of the batch itself, as batch
        norms that are recalibrated do in the mean: so one run says it.
        """
        rows = [batch_size(split_inputs(batch)) or 1 for batch in self._probes]
        most, seen = max(self.processes.gathered(max(rows, default=0))), 0
        few: list[ExampleInputs] = []
        for batch, count in zip(self._probes, rows, strict=True):
            if (count > 1 or most == 1) and seen < _EXAMPLES:
                few.append(batch)
                seen += count
        return Targets(self.dense, few, by_batch=True)

    def _distance(self, candidate: Candidate) -> float:
        """Of its outputs to the dense model's, on the first calibration batches."""
        return self._apart(candidate.module, self._targets)

    @torch.no_grad()
    def _apart(self, module: nn.Module, targets: Targets) -> float:
        """How far the outputs of a module are from these, in the mean over the batches."""
        total = 0.0
        with self.processes.all_or_none(CalibrationError, "comparing outputs"):
            for number, batch in enumerate(targets.data):
                if targets.by_batch:
                    output = by_batch(module, batch, number)
                else:
                    with same_buffers(module):  # which begins where the model is
                        output = call(module, batch, number)
                total += float(distance(output, targets.of(number)))
        sums = torch.tensor([total, len(targets.data)], dtype=torch.float64)
        self.processes.sum_([sums])
        return float(sums[0] / sums[1])
