"""The plan of a net, and the code that it runs in its present phases and ranks."""

from __future__ import annotations

import pytest
from torch import nn

import dynrank_fx as dr


def test_what_was_not_factored_has_no_plan_and_no_inside():
    for verb in (dr.plan_of, dr.inline, dr.truncate):
        with pytest.raises(dr.PlanError, match=r"Linear .*was not made by transform or factorize"):
            verb(nn.Linear(3, 3))
