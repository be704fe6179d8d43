"""Phases of a sharded transformer; it is run by ``torchrun --standalone --nproc-per-node 2 samples/sharded.py``.

The order is that of torchtitan and torchtune: a converter changes the model's layers, then the model is parallelised,
then the optimizer is made.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import chars
import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard

import dynrank_fx as dr

ROWS, STEPS = 16, 20  # of all processes together, and of an epoch


def convert(model: nn.Module) -> nn.Module:
    """The converter. ``Form.LAYERS`` keeps the model's blocks and their code, which is what ``fully_shard`` goes by."""
    return dr.transform(model, chars.example_inputs(), rank=dr.Ratio(0.25), form=dr.Form.LAYERS, exclude=["head"])


def parallelize(net: nn.Module, compiled: bool = False) -> nn.Module:
    """Block by block, as the model's author would do it, whether it was converted or not."""
    for block in net.get_submodule("layers").children():
        if compiled:
            block.compile()
        fully_shard(block)
    return fully_shard(net)


def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """This process's rows of each batch; all draw the same batches."""
    torch.manual_seed(epoch)
    rank, count = distributed.get_rank(), distributed.get_world_size()
    for _, (x, y) in zip(range(STEPS), chars.train_data(), strict=False):
        mine = slice(rank, ROWS, count)
        yield x[mine], y[mine]


def main(epochs: int = 3, compiled: bool = False) -> list[float]:
    """Train; returns the loss of the last batch of each epoch, over all processes."""
    torch.manual_seed(0)
    net = parallelize(convert(chars.CharTransformer(width=64, layers=2)), compiled)
    optimizer = chars.optimizer(net.parameters())
    phases = dr.Phases(net, optimizer, dr.schedules.interleave(low=1, full=1), epochs, steps=STEPS)
    losses = []
    for epoch in range(epochs):
        for x, y in batches(epoch):
            loss = chars.loss(net(x), (x, y))
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        distributed.all_reduce(loss := loss.detach())
        losses.append(loss.item() / distributed.get_world_size())
        if distributed.get_rank() == 0:
            print(f"epoch {epoch + 1} in {phases.history[epoch].phase}: loss {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    distributed.init_process_group()
    main(*map(int, sys.argv[1:2]))
    distributed.destroy_process_group()
