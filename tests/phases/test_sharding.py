"""Sharded parameters are refused in words."""

from __future__ import annotations

import pytest
import torch
from switching import chain
from torch import nn

import dynrank_fx as dr
from dynrank_fx.rewrite import switched_modules


def test_sharded_parameters_are_refused(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        net, mesh = chain(), init_device_mesh("cpu", (1,))
        module = switched_modules(net)["0.weight"][0]
        module._parameters["weight"] = nn.Parameter(distribute_tensor(module.weight.detach(), mesh))
        with pytest.raises(dr.TransitionError, match=r"0\.weight is a DTensor"):
            dr.enter_(net, dr.Phase.LOW)
        sharded = torch.distributed.fsdp.fully_shard(chain(), mesh=mesh)
        with pytest.raises(dr.TransitionError, match="fully_shard"):
            dr.enter_(sharded, dr.Phase.LOW)
    finally:
        torch.distributed.destroy_process_group()
