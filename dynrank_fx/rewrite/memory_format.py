"""The memory format of a parameter that takes the place of others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def in_format_of(value: Tensor, old: Sequence[Tensor]) -> Tensor:
    """In the memory format of the parameters it replaces (channels_last stays so), with the strides of a new tensor.

    ``contiguous`` alone leaves any strides to axes of one entry: by those torch chooses its kernels, and torch.compile
    would take the parameter for one that it has not seen.
    """
    last = value.ndim == 4 and any(_is_channels_last(parameter) for parameter in old)
    layout = torch.channels_last if last else torch.contiguous_format
    if value.stride() == torch.empty(value.shape, device="meta", memory_format=layout).stride():
        return value
    return torch.empty_like(value, memory_format=layout).copy_(value)


def _is_channels_last(parameter: Tensor) -> bool:
    if parameter.ndim != 4 or parameter.stride() == torch.empty(parameter.shape, device="meta").stride():
        return False
    return parameter.is_contiguous(memory_format=torch.channels_last)
