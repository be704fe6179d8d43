"""Move weights, and the optimizer's state with them, between phases; all of a switch or nothing."""

from .agreement import agree_before, agree_on_origin
from .averages import averages_in, averages_of, copy_factors_, modules_of
from .carry import Carry, checked_carry
from .checkpoint import check_place, how_in, info_of, load, read_plan, rebuilt, restore_, save, state_of
from .finite import infinite_buffers, not_finite, warn_of
from .gradients import forget_steps, note_steps
from .groups import Optimizers, optimizers_in
from .init import randomize_
from .refusals import refuse_wrapped
from .rerank import LatencyOf, RankUnit, rank_units, reranked
from .setting import phases_in
from .switch import Transition
from .transition import enter_, phases_of, replan_, tried

__all__ = [
    "Carry",
    "LatencyOf",
    "Optimizers",
    "RankUnit",
    "Transition",
    "agree_before",
    "agree_on_origin",
    "averages_in",
    "averages_of",
    "check_place",
    "checked_carry",
    "copy_factors_",
    "enter_",
    "forget_steps",
    "how_in",
    "infinite_buffers",
    "info_of",
    "load",
    "modules_of",
    "not_finite",
    "note_steps",
    "optimizers_in",
    "phases_in",
    "phases_of",
    "randomize_",
    "rank_units",
    "read_plan",
    "rebuilt",
    "refuse_wrapped",
    "replan_",
    "reranked",
    "restore_",
    "save",
    "state_of",
    "tried",
    "warn_of",
]
