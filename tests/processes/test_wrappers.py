"""Wrappers around a net: found from inside, kept as they are, and free of what they held before a switch."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from several import in_processes
from switching import chain
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import dynrank_fx as dr
from dynrank_fx.processes import ALONE, processes_of, wrappers_of

_KEPT = (
    "bucket_bytes_cap",
    "find_unused_parameters",
    "gradient_as_bucket_view",
    "static_graph",
    "device_ids",
    "process_group",
    "broadcast_buffers",
    "require_backward_grad_sync",
    "parameters_to_ignore",
    "training",
    "_forward_hooks",
    "_comm_hooks",
    "_join_config",
)


class _Holder(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


def _everything(rank: int) -> dict[str, Any]:
    done: dict[str, Any] = {}
    net, bare = chain(), chain()
    holder = _Holder(torch.compile(net, backend="eager"))
    other = torch.distributed.new_group([0, 1])
    wrapper = DistributedDataParallel(
        holder, process_group=other, bucket_cap_mb=2, gradient_as_bucket_view=True, static_graph=True
    ).train()
    wrapper.register_comm_hook(None, allreduce_hook)
    wrapper.register_forward_hook(lambda *_: None)
    compiled = torch.compile(wrapper, backend="eager")
    for given in (net, holder, wrapper, compiled):
        assert wrappers_of(given) == [wrapper]
    assert wrappers_of(bare) == []
    assert processes_of(wrappers_of(net)).group is other
    for name in ("plan_of", "phases_of"):
        assert getattr(dr, name)(DistributedDataParallel(bare)) == getattr(dr, name)(bare)

    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    before, reducer = {name: getattr(wrapper, name) for name in _KEPT}, weakref.ref(wrapper.logger)
    gradient = torch.full((4, 16), float(rank))
    with wrapper.no_sync():
        dr.enter_(net, dr.Phase.LOW, optimizer)
        assert not wrapper.require_backward_grad_sync
    assert {name: getattr(wrapper, name) for name in _KEPT} == before
    assert reducer() is None
    assert wrapper._get_ddp_logging_data()["comm_hook"] == "allreduce_hook"
    wrapper(gradient).sum().backward()
    done["gradients"] = [p.grad.clone() for p in net.parameters()]

    builtin = DistributedDataParallel(chain())
    builtin._register_builtin_comm_hook(torch.distributed.BuiltinCommHookType.ALLREDUCE)
    assert dr.enter_(builtin, dr.Phase.LOW).model is builtin
    done["builtin"] = builtin._get_ddp_logging_data()["comm_hook"]

    frozen = DistributedDataParallel(_ignoring(chain(), "0.weight"))
    for name, do in (("ignored", lambda: dr.enter_(frozen, dr.Phase.LOW)),):
        with pytest.raises(dr.TransitionError) as caught:
            do()
        done[name] = str(caught.value)
    done["leak"] = _leak(rank)
    return done


def _ignoring(net: nn.Module, name: str) -> nn.Module:
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(net, [name])
    return net


def _leak(rank: int) -> list[int]:
    """How many tensors there are after some switches, and after many."""
    net = chain()
    wrapper, counts = DistributedDataParallel(net), []
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)
    for turn in range(1, 41):
        dr.enter_(wrapper, dr.Phase.LOW if turn % 2 else dr.Phase.FULL, optimizer)
        wrapper(torch.randn(2, 16)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if turn in (4, 40):
            gc.collect()
            counts.append(sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects()))
    return counts


def test_a_wrapper_is_found_kept_and_made_again_in_the_same_object() -> None:
    first, second = in_processes(_everything)
    for one, two in zip(first["gradients"], second["gradients"], strict=True):
        assert torch.equal(one, two)
    for done in (first, second):
        assert done["builtin"].endswith("ALLREDUCE")
        assert "0.weight is among the parameters that DistributedDataParallel was told to ignore" in done["ignored"]
        few, many = done["leak"]
        assert many == few


def test_without_other_processes_a_net_is_alone() -> None:
    assert wrappers_of(chain()) == []
    assert processes_of([]) == ALONE
