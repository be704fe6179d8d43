"""The values of parameters after a switch, in the memory format and with the optimizer state of those before."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dynrank_fx as dr


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
