"""Phases in several processes; it is run by ``torchrun --standalone --nproc-per-node 2 samples/with_ddp.py``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import digits
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

import dynrank_fx as dr

BATCH = 64  # of all processes together


def main(epochs: int = 4) -> Sequence[float]:
    """Train on this process's share of every batch; returns the loss at the end of each epoch."""
    torch.manual_seed(0)
    data = digits.train_data().dataset
    sampler: DistributedSampler[object] = DistributedSampler(data, drop_last=True)
    rows = BATCH // distributed.get_world_size()
    loader = DataLoader(data, batch_size=rows, sampler=sampler, drop_last=True)

    net = dr.transform(digits.model(), digits.example_inputs(), rank=dr.Ratio(0.25), exclude=["stem*", "head"])
    model = DistributedDataParallel(net)
    optimizer = digits.optimizer(model.parameters())
    phases = dr.Phases(model, optimizer, dr.schedules.interleave(low=2, full=1), epochs, steps=len(loader))
    losses = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for batch in loader:
            loss = digits.loss(model(batch[0]), batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        distributed.all_reduce(loss := loss.detach(), distributed.ReduceOp.SUM)
        losses.append(loss.item() / distributed.get_world_size())
        if distributed.get_rank() == 0:
            print(f"epoch {epoch + 1} in {phases.history[epoch].phase}: loss {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    distributed.init_process_group()
    main(*map(int, sys.argv[1:2]))
    distributed.destroy_process_group()
