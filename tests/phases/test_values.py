"""The values of parameters after a switch, in the memory format and with the optimizer state of those before."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

import dynrank_fx as dr
from dynrank_fx.layouts import Factors, Layout
from dynrank_fx.phases.groups import in_slots
from dynrank_fx.phases.values import dense_of, factors_of
from dynrank_fx.rewrite import Switched, switched_modules


def test_channels_last_weights_stay_channels_last():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 16, 3)).to(memory_format=torch.channels_last)
    net = dr.transform(model, (torch.randn(2, 16, 6, 6),))
    dr.enter_(net, dr.Phase.LOW)
    dr.enter_(net, dr.Phase.FULL)
    weight = net.get_submodule("0").weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(net.eval()(torch.ones(2, 16, 6, 6)), net(torch.ones(2, 16, 6, 6)))


@pytest.mark.parametrize("layout", [dr.ChannelLayout, dr.SpatialLayout, dr.TuckerLayout, dr.CPLayout])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_kernel_of_one_entry_has_the_strides_that_it_had(layout, memory_format):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 12, 1)).to(memory_format=memory_format)
    net = dr.transform(model, (torch.randn(2, 16, 6, 6),), conv_layout=layout, allow_unprofitable=True)
    strides = net.get_submodule("0").weight.stride()
    for phase in (dr.Phase.LOW, dr.Phase.ADAPTOR, dr.Phase.FULL):
        dr.enter_(net, phase)
        for tensor in (*net.parameters(), *net.buffers()):
            fresh = torch.empty_like(tensor, memory_format=memory_format) if tensor.ndim == 4 else tensor
            assert tensor.stride() == fresh.stride()
    assert net.get_submodule("0").weight.stride() == strides


def sites(share: bool = False) -> list[Switched]:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(12, 10, bias=False), nn.Linear(12, 6, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.a(x), self.b(x)], 1)

    torch.manual_seed(0)
    net = dr.transform(Pair().double(), share_inputs=share, rank=dr.Fixed(3), how=dr.Capture.SYMBOLIC)
    return [modules[0] for modules in switched_modules(net).values()]


def test_the_factors_of_a_weight_lose_no_more_than_its_least_singular_values():
    site = sites()[0]
    weight = site.weight.detach()
    (((left, state), (right, _)),) = factors_of([site], [weight], 3, None)
    assert state == {}
    lost = torch.linalg.vector_norm(weight - left @ right)
    torch.testing.assert_close(lost, torch.linalg.vector_norm(torch.linalg.svdvals(weight)[3:]))


def test_sites_that_share_a_factor_are_split_as_one_weight_and_the_first_gets_what_is_shared():
    pair = sites(share=True)
    weights = [site.weight.detach() for site in pair]
    ((first, _), (right, _)), ((second, _),) = factors_of(pair, weights, 3, None)
    assert [first.shape, second.shape, right.shape] == [(10, 3), (6, 3), (3, 12)]
    stacked = torch.cat(weights)
    lost = torch.linalg.vector_norm(stacked - torch.cat([first, second]) @ right)
    torch.testing.assert_close(lost, torch.linalg.vector_norm(torch.linalg.svdvals(stacked)[3:]))


def test_a_split_that_is_given_goes_before_the_layouts_own_where_it_knows_the_site():
    site, asked = sites()[0], []
    weight = site.weight.detach()

    def split(names: Sequence[str], layout: Layout, stacked: Tensor, rank: int) -> Factors | None:
        asked.append((list(names), layout, torch.equal(stacked, weight), rank))
        return None if len(asked) > 1 else (torch.ones(10, rank), torch.ones(rank, 12))

    ((left, right),) = factors_of([site], [weight], 2, None, split)
    assert torch.equal(left[0], torch.ones(10, 2))
    assert torch.equal(right[0], torch.ones(2, 12))
    ((left, _),) = factors_of([site], [weight], 2, None, split)
    assert not torch.equal(left[0], torch.ones(10, 2))
    assert asked == [(["a.weight"], site.layout, True, 2)] * 2


def test_momentum_goes_into_the_factors_as_gradients_do():
    """∂L/∂B = G Aᵀ and ∂L/∂A = Bᵀ G for W = B A."""
    site = sites()[0]
    optimizer = torch.optim.SGD([site.weight], lr=0.1, momentum=0.9)
    weight, gradient = site.weight.detach().clone(), torch.randn(10, 12).double()
    site.weight.grad = gradient
    optimizer.step()
    with in_slots([optimizer]):
        (((left, of_left), (right, of_right)),) = factors_of([site], [weight], 3, optimizer)
    torch.testing.assert_close(of_left["momentum_buffer"], gradient @ right.T)
    torch.testing.assert_close(of_right["momentum_buffer"], left.T @ gradient)


def test_dense_weights_come_without_state_where_nothing_is_carried():
    pair = sites()
    weights = [site.weight.detach() for site in pair]
    found = dense_of(pair, weights, None)
    assert [[(id(value), state) for value, state in values] for values in found] == [[(id(w), {})] for w in weights]
