"""What the tests of compression share as fixtures."""

from __future__ import annotations

import pytest
import torch
from compressing import Pictured, pictures
from torch import nn

import dynrank_fx as dr


@pytest.fixture(params=[dr.Capture.SYMBOLIC, dr.Capture.EXPORT])
def small(request: pytest.FixtureRequest) -> nn.Module:
    """A ``Pictured`` that was cut, by either way to capture it."""
    torch.manual_seed(0)
    net = dr.transform(Pictured(), pictures(1)[0], rank=dr.Fixed(2), how=request.param, allow_unprofitable=True)
    return dr.truncate(net, pictures())
