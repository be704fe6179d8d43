"""Decide on data: which weights are factored, by which layout, to which rank, and why the others stay dense."""

from .budget import Budget
from .costs import break_even_rank, costs_of, curve_of, spectrum_of
from .find import find_sites, why_not
from .fit import fit_plan
from .locate import Located, NodeUse, Reader, locate, may_share
from .make import make_plan, plan_by
from .options import PlanChoices, PlanOptions, chosen
from .overrides import Override, override_of
from .plan import Plan, PlannedSite, checked_plan
from .ranks import Cost, Curve, Energy, Fixed, Metric, RankPolicy, Ratio, StableRank, checked_policy, ranks_by_policy
from .roles import Role
from .site import fits
from .step_times import StepTimes
from .whole_step import with_whole

__all__ = [
    "Budget",
    "Cost",
    "Curve",
    "Energy",
    "Fixed",
    "Located",
    "Metric",
    "NodeUse",
    "Override",
    "Plan",
    "PlanChoices",
    "PlanOptions",
    "PlannedSite",
    "RankPolicy",
    "Ratio",
    "Reader",
    "Role",
    "StableRank",
    "StepTimes",
    "break_even_rank",
    "checked_plan",
    "checked_policy",
    "chosen",
    "costs_of",
    "curve_of",
    "find_sites",
    "fit_plan",
    "fits",
    "locate",
    "make_plan",
    "may_share",
    "override_of",
    "plan_by",
    "ranks_by_policy",
    "spectrum_of",
    "why_not",
    "with_whole",
]
