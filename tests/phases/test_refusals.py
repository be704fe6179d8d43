"""What a switch refuses, in words, and leaves as it was."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from switching import chain, snapshot, trained
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.pipelining import PipelineStage

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


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """Of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


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

        class PipelineEngine(DeepSpeedEngine):  # as DeepSpeed has it
            pass

        for wrapped in (DeepSpeedEngine(chain()), PipelineEngine(chain()), nn.DataParallel(chain())):
            with pytest.raises(dr.TransitionError, match=r"wrapped in Da?e?.*DistributedDataParallel instead"):
                dr.enter_(wrapped, dr.Phase.LOW)

    @pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`")  # of one process
    def test_the_first_fsdp_and_pipelines_are_refused_before_training(self, group):
        with pytest.raises(dr.TransitionError, match=r"0\.weight has its weight as a param.*first FSDP.*fully_shard"):
            FullyShardedDataParallel(chain(), device_id=torch.device("cpu"))
        first = FullyShardedDataParallel(nn.Linear(2, 2), device_id=torch.device("cpu"))
        net, wrapped = chain(), nn.parallel.DistributedDataParallel(chain())
        stages = [PipelineStage(each, 0, 2, torch.device("cpu")) for each in (net, wrapped)]
        for given, said in (
            (first, "FullyShardedDataParallel, the first FSDP.*DistributedDataParallel instead"),
            *((each, "in a stage of a pipeline.*by fully_shard") for each in (*stages, net, wrapped, wrapped.module)),
        ):
            with pytest.raises(dr.TransitionError, match=said):
                dr.enter_(given, dr.Phase.LOW)
            with pytest.raises(dr.TransitionError, match=said):
                dr.Phases(given, torch.optim.SGD(net.parameters()), dr.schedules.always(dr.Phase.LOW), steps=2)
        assert dr.enter_(chain(), dr.Phase.LOW)

    def test_a_switch_while_others_may_have_ended(self, group):
        wrapped = nn.parallel.DistributedDataParallel(chain())
        phases = dr.Phases(wrapped, torch.optim.SGD(wrapped.parameters()), dr.schedules.always(dr.Phase.LOW), 2)
        phases.begin(0)
        for do in (lambda: dr.enter_(wrapped, dr.Phase.FULL), lambda: phases.begin(1)):
            with pytest.raises(dr.TransitionError, match=r"within join.*drop_last=True.*\(throw_on"), wrapped.join():
                do()
        with wrapped.join(throw_on_early_termination=True):
            phases.begin(1)

    def test_one_process_in_distributed_data_parallel_switches(self, group):
        net = chain()
        wrapped = nn.parallel.DistributedDataParallel(net)
        dr.enter_(wrapped, dr.Phase.LOW)
        wrapped(torch.randn(2, 16)).sum().backward()
        assert all(p.grad is not None for p in net.parameters())
