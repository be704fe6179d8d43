"""Phases of a site, and the facts a schedule may look at. No torch here: a schedule is plain Python."""

from __future__ import annotations

import enum

ALPHA = 16.0
"""The branch of an ADAPTOR is multiplied by this over its rank: the constant of the paper's code (arXiv 2508.08625)."""


class Phase(enum.IntEnum):
    """What a site trains.

    The module of a site stores the plain ``int``: Dynamo guards an Enum by identity and mixes up sites
    that share one, so that results of mixed settings are silently wrong.
    """

    FULL = 0
    """The dense weight trains."""
    LOW = 1
    """Only the factors exist and train."""
    ADAPTOR = 2
    """A frozen dense base plus a trained low-rank branch of scale ``ALPHA / rank``: the paper's own last phase."""


"""One phase for every site, or a phase per site name or pattern (sites it does not name keep theirs)."""
"""A pure function of the state: the same state always gives the same setting."""
