"""What factors start from that no weight gives them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dynrank_fx as dr
from dynrank_fx.layouts import CONV_LAYOUTS
from dynrank_fx.phases.init import branch
from dynrank_fx.rewrite import switched_modules

SYMBOLIC = dr.Capture.SYMBOLIC


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


@pytest.mark.parametrize(
    ("layer", "layout"),
    [
        (nn.Linear(12, 8), dr.ChannelLayout),
        (nn.Embedding(12, 8), dr.ChannelLayout),
        (nn.ConvTranspose2d(8, 6, 3), dr.ChannelLayout),
        *((nn.Conv2d(8, 6, 3), layout) for layout in CONV_LAYOUTS),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_the_branch_of_an_adaptor_starts_at_zero_and_every_factor_but_the_last_is_random(layer, layout):
    torch.manual_seed(0)
    x = torch.zeros(2, 3, dtype=torch.int64) if isinstance(layer, nn.Embedding) else torch.randn(2, 8, 5, 5)
    x = torch.randn(2, 12) if isinstance(layer, nn.Linear) else x
    net = dr.transform(
        nn.Sequential(layer), (x,), rank=dr.Fixed(2), conv_layout=layout, allow_unprofitable=True, how=SYMBOLIC
    )
    ((site,),) = switched_modules(net).values()
    like = site.weight.detach().double()
    factors = branch(site, 3, like)
    assert [tuple(factor.shape) for factor in factors] == list(site.layout.factor_shapes(site.shape, 3))
    assert all(factor.dtype == torch.float64 for factor in factors)
    assert not site.layout.join(factors).any()
    assert [bool(factor.any()) for factor in factors].count(False) == 1
    expected = net(x)
    dr.enter_(net, dr.Phase.ADAPTOR)
    torch.testing.assert_close(net(x), expected)
    net(x).square().sum().backward()
    assert any(factor.grad.any() for factor in site.factors), "it can leave zero"


def test_only_the_sites_in_low_are_randomized():
    torch.manual_seed(0)
    net = dr.transform(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), (torch.randn(2, 16),), rank=dr.Fixed(4))
    dr.enter_(net, {"1.weight": dr.Phase.LOW})
    before = {name: value.clone() for name, value in net.state_dict().items()}
    dr.randomize_(net)
    changed = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"1.left", "1.right"}
