"""The groups of a net's sites: who shares a right factor with whom, and what their weight is as one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import dynrank_fx as dr
from dynrank_fx.rewrite import site_groups, switched_modules


class Attention(nn.Module):
    """Query, key and value of one input, an output of another, and a tied pair."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 8), nn.Linear(16, 12)
        self.out, self.again = nn.Linear(36, 16), nn.Linear(36, 16)
        self.again.weight = self.out.weight

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([self.q(x), self.k(x), self.v(x)], -1)
        return self.out(torch.tanh(y)) + self.again(y)


def net(*, share: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return dr.transform(Attention(), (torch.randn(4, 16),), rank=dr.Fixed(2), share_inputs=share)


def test_sites_that_share_a_factor_are_one_group_and_every_other_is_one_by_itself() -> None:
    shared, alone = site_groups(net())
    assert shared.names == ("q.weight", "k.weight", "v.weight")
    assert (shared.name, shared.shared, shared.owner.site) == ("q.weight", True, "q.weight")
    assert (alone.names, alone.shared, len(alone.modules)) == (("out.weight",), False, 2)  # tied: two modules
    assert [group.names for group in site_groups(net(share=False))] == [
        ("q.weight",),
        ("k.weight",),
        ("v.weight",),
        ("out.weight",),
    ]


def test_a_group_holds_each_module_of_its_sites_once() -> None:
    model = net()
    found = [module for group in site_groups(model) for module in group.modules]
    assert len(found) == len({id(module) for module in found})
    assert {id(m) for m in found} == {id(m) for modules in switched_modules(model).values() for m in modules}


@pytest.mark.parametrize("names", [["v.weight"], ["out.weight", "k.weight"], ["k.weight", "q.weight"], []])
def test_the_groups_of_some_sites_are_whole_and_in_their_order(names: list[str]) -> None:
    groups = site_groups(net(), names)
    firsts = list(dict.fromkeys("out.weight" if name == "out.weight" else "q.weight" for name in names))
    assert [group.name for group in groups] == firsts
    assert all(len(group.names) == 3 for group in groups if group.name == "q.weight")


@pytest.mark.parametrize("phase", [dr.Phase.FULL, dr.Phase.LOW])
def test_its_weight_is_that_of_the_sites_one_above_the_other(phase: dr.Phase) -> None:
    """In LOW the product of the lefts, one above the other, with the one right."""
    model = net()
    dr.enter_(model, phase)
    group = site_groups(model)[0]
    assert group.shape == tuple(group.weight.shape) == (36, 16)
    if phase is dr.Phase.FULL:
        expected = torch.cat([model.get_parameter(f"{name}.weight") for name in "qkv"])
    else:
        lefts = torch.cat([model.get_parameter(f"{name}.left") for name in "qkv"])
        expected = lefts @ model.get_parameter("q.right")
    torch.testing.assert_close(group.weight, expected.detach())


def test_the_groups_of_a_compiled_net_are_those_of_the_net_inside() -> None:
    model = net()
    assert [group.names for group in site_groups(torch.compile(model))] == [group.names for group in site_groups(model)]
