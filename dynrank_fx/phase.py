"""The phases that the weights of a model are in while it trains. No torch here: a schedule is plain Python."""

from __future__ import annotations

import enum
from collections.abc import Iterable

ALPHA = 16.0
"""The branch of an ADAPTOR is multiplied by this over its rank: the constant of the paper's code (arXiv 2508.08625)."""


class Phase(enum.IntEnum):
    """What a site trains. A schedule chooses one of these for every epoch, and ``enter_`` brings the net there.

    The module of a site stores the plain ``int``: Dynamo guards an Enum by identity and mixes up sites
    that share one, so that results of mixed settings are silently wrong.

    Attributes:
        FULL: The dense weight trains.
        LOW: Only the factors exist and train.
        ADAPTOR: A frozen dense base plus a trained low-rank branch of scale ``ALPHA / rank``: the last phase of
            arXiv 2508.08625.
    """

    FULL = 0
    LOW = 1
    ADAPTOR = 2


def summary(phases: Iterable[Phase]) -> str:
    """``FULL`` or ``LOW`` where all sites are in it, or how many are in which: ``1 FULL 3 LOW``."""
    given = list(phases)
    counts = [(phase.name, given.count(phase)) for phase in Phase if phase in given]
    return counts[0][0] if len(counts) == 1 else " ".join(f"{count} {name}" for name, count in counts)
