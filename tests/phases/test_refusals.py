"""What a switch refuses, in words, and leaves as it was."""

from __future__ import annotations

import pytest
import torch
from switching import chain, snapshot, trained
from torch import nn

import dynrank_fx as dr
from dynrank_fx.rewrite import switched_modules


@pytest.mark.parametrize("start", list(dr.Phase))
def test_non_finite_weights_at_one_site_leave_everything_as_it_was(start):
    net = chain()
    dr.enter_(net, start)
    optimizer = trained(net)
    last = list(switched_modules(net).values())[-1][0]
    with torch.no_grad():
        next(p for n, p in last.named_parameters() if n != "bias").view(-1)[3] = float("nan")
    before = snapshot(net, optimizer)
    other = dr.Phase.LOW if start is dr.Phase.FULL else dr.Phase.FULL
    with pytest.raises(dr.TransitionError, match=r"2\.weight has non-finite weights"):
        dr.enter_(net, other, optimizer)
    after = snapshot(net, optimizer)
    assert after[2] == before[2]
    for name, value in before[0].items():
        torch.testing.assert_close(after[0][name], value, rtol=0, atol=0, equal_nan=True)


class TestRefusals:
    def test_pending_gradients(self):
        net = chain()
        dr.enter_(net, dr.Phase.LOW)
        net(torch.randn(2, 16)).sum().backward()
        with pytest.raises(dr.TransitionError, match=r"pending gradient.*zero_grad"):
            dr.enter_(net, dr.Phase.FULL)

    def test_an_optimizer_of_another_net(self):
        with pytest.raises(dr.TransitionError, match="holds no parameter of the sites"):
            dr.enter_(chain(), dr.Phase.LOW, torch.optim.SGD(chain().parameters(), lr=0.1))

    def test_a_net_without_sites(self):
        with pytest.raises(dr.TransitionError, match="no site to switch"):
            dr.enter_(nn.Linear(3, 3), dr.Phase.LOW)

    def test_adaptors_over_a_shared_factor(self):
        class Pair(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.a(x) * self.b(x)

        net = dr.transform(Pair(), (torch.randn(2, 16),), share_inputs=True)
        with pytest.raises(dr.TransitionError, match=r"share a factor.*without share_inputs"):
            dr.enter_(net, dr.Phase.ADAPTOR)

    def test_distributed_wrappers_and_dtensors(self, tmp_path):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import distribute_tensor

        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
        try:
            net = chain()
            wrapped = nn.parallel.DistributedDataParallel(net)
            with pytest.raises(dr.TransitionError, match="DistributedDataParallel"):
                dr.enter_(wrapped, dr.Phase.LOW)
            mesh = init_device_mesh("cpu", (1,))
            module = switched_modules(net)["0.weight"][0]
            module._parameters["weight"] = nn.Parameter(distribute_tensor(module.weight.detach(), mesh))
            with pytest.raises(dr.TransitionError, match=r"0\.weight is a DTensor"):
                dr.enter_(net, dr.Phase.LOW)
            sharded = torch.distributed.fsdp.fully_shard(chain(), mesh=mesh)
            with pytest.raises(dr.TransitionError, match="FSDP"):
                dr.enter_(sharded, dr.Phase.LOW)
        finally:
            torch.distributed.destroy_process_group()
