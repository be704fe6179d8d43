"""What factors start from that no weight gives them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dynrank_fx as dr
from dynrank_fx.rewrite import switched_modules


def test_random_factors_have_the_scale_of_what_they_replace_and_none_of_its_directions():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(32, 64, 3, groups=2), nn.Flatten(), nn.Linear(64, 128))
    net = dr.transform(model, (torch.randn(2, 32, 3, 3),), rank=dr.Ratio(0.5), allow_unprofitable=True)
    with pytest.raises(dr.TransitionError, match="no site is in LOW"):
        dr.randomize_(net)
    dr.enter_(net, dr.Phase.LOW)
    sites = [modules[0] for modules in switched_modules(net).values()]
    before = [site.weight.detach() for site in sites]
    held = [site.factors for site in sites]
    dr.randomize_(net)
    for site, old, factors in zip(sites, before, held, strict=True):
        assert all(a is b for a, b in zip(site.factors, factors, strict=True)), "an optimizer keeps them"
        new = site.weight.detach()
        assert float(new.norm() / old.norm()) == pytest.approx(1, abs=0.1)
        assert abs(float((new * old).sum() / (new.norm() * old.norm()))) < 0.05
