"""Rewrite once: every planned weight of a traced model becomes a switchable site."""

from .factorize import factorize, factorize_
from .groups import SiteGroup, site_groups
from .inline import holds_captured, inline, inline_
from .loading import LOADED
from .memory_format import in_format_of
from .meta import GIVEN, a_twin, plan_of, set_layouts_, set_plan, specialize_
from .pretrained import expect_factors_
from .stack import stack_firsts_
from .switched import STEM, Switched, copies_of, is_written, switched_modules
from .transform import transform

__all__ = [
    "GIVEN",
    "LOADED",
    "STEM",
    "SiteGroup",
    "Switched",
    "a_twin",
    "copies_of",
    "expect_factors_",
    "factorize",
    "factorize_",
    "holds_captured",
    "in_format_of",
    "inline",
    "inline_",
    "is_written",
    "plan_of",
    "set_layouts_",
    "set_plan",
    "site_groups",
    "specialize_",
    "stack_firsts_",
    "switched_modules",
    "transform",
]
