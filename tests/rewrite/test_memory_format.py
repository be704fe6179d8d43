"""Memory formats: a value that takes the place of a parameter lies in memory as a new tensor of its kind would."""

from __future__ import annotations

import torch
from torch import nn

from dynrank_fx.rewrite import in_format_of


def test_a_value_takes_the_memory_format_of_what_it_replaces_and_the_strides_of_a_new_tensor():
    kernel = torch.randn(4, 3, 2, 2)
    last = nn.Parameter(kernel.to(memory_format=torch.channels_last))
    first = nn.Parameter(kernel.clone())
    for old, memory_format in ((last, torch.channels_last), (first, torch.contiguous_format)):
        for value in (kernel, last.detach(), kernel.transpose(2, 3)):
            found = in_format_of(value, [old])
            assert torch.equal(found, value)
            assert found.stride() == torch.empty(value.shape, memory_format=memory_format).stride()
    assert in_format_of(kernel, [first]) is kernel, "what has the format already is not copied"
    matrix = torch.randn(3, 4).mT
    assert in_format_of(matrix, [last]).is_contiguous(), "a matrix has no channels"
