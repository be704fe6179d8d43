"""A truncated model on two processes, each with its share of every rank, compared with the whole one.

torchrun --nproc-per-node 2 samples/tensor_parallel.py
"""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import parallelize_module

import dynrank_fx as dr


class MLP(nn.Module):
    """A block as of a transformer, between an input and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 256), nn.Linear(256, 128)
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = torch.relu(self.stem(x))
        return self.head(h + self.down(torch.relu(self.up(h))))  # type: ignore[no-any-return]


def step(model: nn.Module, x: Tensor, labels: Tensor) -> tuple[Tensor, int, int]:
    """The outputs, and how many all-reduces forward and backward take; gradients are in the parameters."""
    x = x.clone().requires_grad_()  # so that torch's counter sees backward end, and does not warn
    with CommDebugMode() as forward:
        y = model(x)
    with CommDebugMode() as backward:
        nn.functional.cross_entropy(y, labels).backward()
    return y.detach(), forward.get_total_counts(), backward.get_total_counts()


def main() -> tuple[int, int]:
    """Compare, and return the counts of one step."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    torch.manual_seed(0)  # the same model and the same data in all processes
    x, labels = torch.randn(32, 64), torch.randint(10, (32,))
    batches = [(torch.randn(32, 64),) for _ in range(8)]
    count, rank = dist.get_world_size(), dist.get_rank()

    # Ranks that the processes can share, and a calibration in which each sees its own part of the batches.
    net = dr.transform(MLP().eval(), (x,), rank=dr.Ratio(0.25), multiple_of=count, exclude=["stem", "head"])
    whole = dr.truncate(net, batches[rank::count], group=dist.group.WORLD)

    split = copy.deepcopy(whole)
    plan = dr.rank_parallel_plan(split)
    split = parallelize_module(split, init_device_mesh("cpu", (count,)), plan)
    wanted, _, _ = step(whole, x, labels)
    y, forward, backward = step(split, x, labels)

    torch.testing.assert_close(y, wanted)
    for (name, parameter), other in zip(whole.named_parameters(), split.parameters(), strict=True):
        gradient = other.grad.full_tensor() if name.rpartition(".")[0] in plan else other.grad
        torch.testing.assert_close(gradient, parameter.grad, msg=lambda said, name=name: f"{name}: {said}")
    here = sum(p.to_local().numel() for p in split.parameters() if hasattr(p, "to_local"))
    if rank == 0:
        factored = sum(p.numel() for name, p in whole.named_parameters() if name.rpartition(".")[0] in plan)
        print(f"split: {', '.join(plan)}")
        print(f"{here:,} of {factored:,} parameters of factors in each of {count} processes")
        print(f"outputs and gradients agree; {forward} all-reduces forward, {backward} backward")
    return forward, backward


if __name__ == "__main__":
    main()
    dist.destroy_process_group()
