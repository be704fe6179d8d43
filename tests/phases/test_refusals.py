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

    def test_what_wraps_a_net_and_is_not_served_names_what_is(self):
        class DeepSpeedEngine(nn.Module):
            def __init__(self, module: nn.Module) -> None:
                super().__init__()
                self.module = module

        for wrapped in (DeepSpeedEngine(chain()), nn.DataParallel(chain())):
            with pytest.raises(dr.TransitionError, match=rf"{type(wrapped).__name__}.*DistributedDataParallel instead"):
                dr.enter_(wrapped, dr.Phase.LOW)

    def test_one_process_in_distributed_data_parallel_switches(self, tmp_path):
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
        try:
            net = chain()
            wrapped = nn.parallel.DistributedDataParallel(net)
            dr.enter_(wrapped, dr.Phase.LOW)
            wrapped(torch.randn(2, 16)).sum().backward()
            assert all(p.grad is not None for p in net.parameters())
        finally:
            torch.distributed.destroy_process_group()
