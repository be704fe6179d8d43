"""Move weights, and the optimizer's state with them, between phases; all of a switch or nothing."""

from .carry import Carry, checked_carry
from .checkpoint import how_in, info_of, load, read_plan, rebuilt, restore_, save, state_of
from .init import randomize_
from .rerank import LatencyOf, RankUnit, rank_units, reranked
from .setting import phases_in
from .transition import Transition, enter_, phases_of, replan_

__all__ = [
    "Carry",
    "LatencyOf",
    "RankUnit",
    "Transition",
    "checked_carry",
    "enter_",
    "how_in",
    "info_of",
    "load",
    "phases_in",
    "phases_of",
    "randomize_",
    "rank_units",
    "read_plan",
    "rebuilt",
    "replan_",
    "reranked",
    "restore_",
    "save",
    "state_of",
]
