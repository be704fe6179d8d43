"""Measured times of sites, dense against factored, by the provider that the model will run on; kept in a cache.

What a site costs is not its FLOPs: thin products run at fewer FLOP/s and two kernels start where one did. So each site
is timed by itself in onnxruntime, in turn with its dense form, at the shapes of the example inputs.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..checks import checked_path, is_whole
from ..errors import CalibrationError
from ..onnx import Provider, bound, runtime, session_of, threads
from ..plan import Cost, PlannedSite
from ..times_file import Times, cores, default_cache, key_of, read_times, write_times
from ..timing import Pair, interleaved, processor
from .site_model import site_model

_STEPS = 8
"""Ranks that are timed, evenly up to the last that saves parameters; between them times are taken as straight lines."""
_SECONDS = 5e-4  # so long at least is one measurement
_MOST_SECONDS, _FEWEST = 0.5, 5  # what runs for long is measured less often: the median of these is steady


@dataclass
class SiteTimes:
    """Measured times of single sites in onnxruntime on this machine, dense against factored, kept in a file.

    Attributes:
        provider: The provider of onnxruntime that runs them.
        element: NumPy's name of the type of the numbers.
        cache: The file; its entries are keyed by machine, versions, provider, type and shapes. None for no file.
        repeats: How many measurements of each, of which the median counts; fewer of sites that run for long.

    Raises:
        CalibrationError: For a type or a number that cannot be.
    """

    provider: Provider = "CPUExecutionProvider"
    element: str = "float32"
    cache: Path | None = field(default_factory=default_cache)
    repeats: int = 15
    _known: Times = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.element not in ("float32", "float16"):
            raise CalibrationError(
                f"times are measured in float32 or float16, not in {self.element!r}: give one of them"
            )
        if not is_whole(self.repeats, 1):
            raise CalibrationError(f"{self.repeats!r} repeats measure nothing: give a whole number of 1 or more")
        self.cache = None if self.cache is None else checked_path(self.cache)
        self._known = read_times(self.cache)

    def pair(self, rows: Sequence[PlannedSite], rank: int) -> Pair | None:
        """Times of a site, dense and factored, measured in turn or taken from the cache.

        Args:
            rows: The row of the plan, or those of the sites that share a factor.
            rank: The rank of the factors.

        Returns:
            Dense (first) and factored (second) seconds; None where the site cannot be run by itself.
        """
        key = self._key(rows, rank)
        if key not in self._known:
            pair = self._measured(rows, rank)
            self._known[key] = None if pair is None else [pair.first, pair.second, pair.ratio]
        values = self._known[key]
        return None if values is None else Pair(values[0], values[1], values[2])

    def cost(self, rows: Sequence[PlannedSite], total: float) -> Cost | None:
        """The curve of a site's time over its ranks; never falling with the rank.

        Args:
            rows: The row of the plan, or those of the sites that share a factor.
            total: The time of the whole dense model, in seconds.

        Returns:
            The cost in shares of ``total``; None where the site cannot be run by itself.
        """
        limit = paying_limit(rows)
        ranks = sorted({max(1, limit * step // _STEPS) for step in range(1, _STEPS + 1)})
        pairs = [self.pair(rows, rank) for rank in ranks]
        timed = [pair for pair in pairs if pair is not None]
        if len(timed) < len(ranks):
            return None
        dense = float(np.median([pair.first for pair in timed]))
        times = np.maximum.accumulate([pair.ratio * dense for pair in timed])
        return Cost(dense / total, lambda rank: float(np.interp(rank, ranks, times)) / total)

    def save(self) -> None:
        """Write the cache, whole or not at all; without a word where the disk does not let it."""
        write_times(self.cache, self._known)

    def _key(self, rows: Sequence[PlannedSite], rank: int) -> str:
        uses = [[row.layout.name, row.site.shape, row.site.to_json()["uses"]] for row in rows]
        if len(rows) > 1 and rows[0].site.by_code:
            uses.append(["each by itself"])
        where = [platform.node(), processor(), cores(), threads(), runtime().__version__, self.provider, self.element]
        return key_of([where, uses, rank])

    def _measured(self, rows: Sequence[PlannedSite], rank: int) -> Pair | None:
        sides = [site_model(rows, r, np.dtype(self.element)) for r in (None, rank)]
        runs = []
        for side in sides:
            if side is None:
                return None
            model, feeds = side
            runs.append(bound(session_of(model.SerializeToString(), self.provider), feeds))
        first, second = runs
        once = interleaved(first, second, repeats=3)
        inner = min(max(1, round(_SECONDS / max(once.first, 1e-7))), 200)
        affordable = round(_MOST_SECONDS / max(inner * (once.first + once.second), 1e-7))
        return interleaved(first, second, repeats=min(self.repeats, max(affordable, _FEWEST)), inner=inner)


def paying_limit(rows: Sequence[PlannedSite]) -> int:
    """The last rank at which the factors of a site, or of those that share one, have fewer parameters than dense."""
    low, high = 1, rows[0].layout.max_rank((sum(row.site.shape[0] for row in rows), *rows[0].site.shape[1:]))
    dense = sum(row.site.params for row in rows)

    def params(rank: int) -> int:
        shapes = [row.layout.factor_shapes(row.site.shape, rank)[: len(row.factor_names)] for row in rows]
        return sum(int(np.prod(shape)) for each in shapes for shape in each)

    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if params(middle) < dense else (low, middle - 1)
    return low
