"""What the dense model gives for batches, which many cuts of it are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from ..aliases import Output
from ..tracing import ExampleInputs, same_buffers, tensors
from .batches import call
from .batchnorms import batch_statistics, norms_of

_ROOM = 2**28
"""So many bytes of outputs are kept: a language model's would be larger than the model."""


@dataclass
class Targets:
    """The outputs of a model for batches, run once for each as far as there is room to keep them.

    by_batch: whether its batch norms go by the statistics of each batch, and not by their own.
    """

    dense: nn.Module
    data: Sequence[ExampleInputs]
    by_batch: bool = False
    room: int = _ROOM
    _kept: dict[int, Output] = field(default_factory=dict)

    def of(self, number: int) -> Output:
        """The output for a batch, without gradients."""
        if number in self._kept:
            return self._kept[number]
        with torch.no_grad():
            output = by_batch(self.dense, self.data[number], number) if self.by_batch else self._plain(number)
        needed = sum(tensor.nbytes for tensor in tensors(output))
        if needed <= self.room:
            self.room -= needed
            self._kept[number] = output
        return output

    def _plain(self, number: int) -> Output:
        with same_buffers(self.dense):  # every batch finds the model as it is
            return call(self.dense, self.data[number], number)


def by_batch(module: nn.Module, batch: ExampleInputs, number: int) -> Output:
    """The output with the batch's own statistics in every batch norm; the module stays as it is."""
    with same_buffers(module), batch_statistics(norms_of(module)) as weigh:
        weigh(0.0)
        return call(module, batch, number)
