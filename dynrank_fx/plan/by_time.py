"""Ranks by what a training step takes: no site is factored that would be slower in LOW than dense."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from ..timing import Pair
from .plan import PlannedSite
from .step_times import StepTimes

_MULTIPLES = (8, 16, 32, 64)  # kernels work in tiles of such sizes
_NEAR = (0.75, 1.25)  # ranks that may stand for the one asked for, in parts of it
_LEAST = 0.5  # of it, where none of those is faster than dense
_ALIKE = 1.03  # times that differ less are the same
_FASTER = 0.97  # of the dense time: what is not below it by more than measurements differ is no gain


def by_time(
    rows: Sequence[PlannedSite],
    times: StepTimes,
    multiple_of: int,
    limit: int,
    pays: Callable[[Sequence[PlannedSite]], bool],
) -> list[PlannedSite] | str:
    """The rows of a site, or of those that share a factor, at the rank near theirs that takes least time for what is
    kept, with its times on the first of them; or as a sentence why it stays dense.

    A rank below the one asked for has to gain more in time than it loses in rank, so that the time is over the rank: a
    smaller one is always faster by some, and taken for that alone all ranks would shrink. One above it keeps no more
    than was asked for.

    multiple_of: of which other ranks have to be multiples. limit: the largest rank. pays: whether rows cost less than
    dense otherwise. Rows that cannot be timed stay as they are.
    """
    rank = rows[0].rank
    timed: dict[int, Pair] = {}

    def measured(ranks: Sequence[int]) -> None:
        for each in ranks:
            at = [replace(row, rank=each) for row in rows]
            if each not in timed and 1 <= each <= limit and pays(at) and (pair := times.pair(at)) is not None:
                timed[each] = pair

    measured([rank])
    if not timed:
        return list(rows)
    measured([each for each in _multiples([rank], multiple_of) if _NEAR[0] * rank <= each <= _NEAR[1] * rank])
    prices = {each: pair.ratio / min(each, rank) for each, pair in timed.items() if pair.ratio < _FASTER}
    if prices:
        good = [each for each, price in prices.items() if price <= _ALIKE * min(prices.values())]
        return _with_times(rows, min(good, key=lambda each: (abs(each - rank), each)), timed)
    less = _multiples([share * rank for share in (_NEAR[0], _LEAST)], multiple_of)
    for each in reversed([each for each in less if _LEAST * rank <= each < _NEAR[0] * rank]):
        measured([each])
        if each in timed and timed[each].ratio < _FASTER:
            return _with_times(rows, each, timed)
    pair = timed[rank]
    tried = f"ranks from {min(timed)} to {max(timed)} are not faster either" if len(timed) > 1 else ""
    return (
        f"measured: a training step takes {_said(pair.ratio * pair.first)} with factors of rank {rank} and "
        f"{_said(pair.first)} dense{'; ' * bool(tried)}{tried}"
    )


def _multiples(ranks: Sequence[float], multiple_of: int) -> list[int]:
    """The multiples next to these numbers, above and below, that are multiples of the number asked for too."""
    found = {k * near for k in _MULTIPLES for rank in ranks for near in (int(rank // k), int(-(-rank // k)))}
    return sorted(each for each in found if each % multiple_of == 0)


def _with_times(rows: Sequence[PlannedSite], rank: int, timed: dict[int, Pair]) -> list[PlannedSite]:
    pair = timed[rank]
    asked = None if rank == rows[0].rank else rows[0].rank
    first, *others = (replace(row, rank=rank, asked=asked) for row in rows)
    return [replace(first, seconds=(pair.first, pair.ratio * pair.first)), *others]


def _said(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.3g} µs"
