"""Tensor parallelism along the rank: the truth is the same module whole, in one process."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from several import in_processes
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode

import dynrank_fx as dr


class Products(nn.Module):
    """Linears with and without a bias, a product ``x @ W``, one by a transpose, a weight in parts, a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.conv = nn.Linear(16, 32), nn.Linear(32, 24, bias=False), nn.Conv1d(1, 1, 3, padding=1)
        self.w, self.o = nn.Parameter(torch.randn(24, 20)), nn.Parameter(torch.randn(30, 20))
        self.parts = nn.Parameter(torch.randn(30, 30))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.b(torch.relu(self.a(x))) @ self.w) @ self.o.T
        p, q = self.parts.split(15)
        return torch.cat([nn.functional.linear(h, p), nn.functional.linear(self.conv(h[:, None])[:, 0], q)], -1)


class Tied(nn.Module):
    """Three linears that can share a factor, one weight in two layers, and two layers of a name that factors have."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.first, self.second = (nn.Linear(16, 16, bias=False) for _ in range(4))
        self.second.weight = self.first.weight
        self.left, self.right = nn.Linear(16, 16), nn.Linear(16, 16)
        self.last = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(torch.relu(self.first(self.q(x) * self.k(x))))
        return self.last(self.left(torch.relu(self.right(x))))


def net_of(model: type[nn.Module], **options: Any) -> nn.Module:
    torch.manual_seed(0)
    net = dr.transform(model(), (torch.randn(5, 16),), rank=dr.Fixed(4), allow_unprofitable=True, **options)
    dr.enter_(net, dr.Phase.LOW)
    return net


class Sent(TorchDispatchMode):
    """What is sent, by kind; torch's CommDebugMode loses its way among the modules of some models."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(isinstance(each, DTensor) for each in args):
            return NotImplemented  # which goes on to what lies in its parts
        kind = func._schema.name.split("::")[1]
        if func.namespace == "_c10d_functional" and kind not in ("wait_tensor", "_wrap_tensor_autograd"):
            self.counts[kind] += 1
        return func(*args, **(kwargs or {}))


def compared(whole: nn.Module) -> dict[str, Any]:
    """A module over both processes, beside itself: how far apart they are, and what is sent."""
    split = copy.deepcopy(whole)
    plan = dr.rank_parallel_plan(split)
    split = parallelize_module(split, init_device_mesh("cpu", (2,)), plan)
    x = torch.randn(7, 16, generator=torch.Generator().manual_seed(1))
    one, other = (x.clone().requires_grad_() for _ in range(2))
    wanted = whole(one)
    wanted.square().sum().backward()
    with Sent() as forward:
        y = split(other)
    with Sent() as backward:
        y.square().sum().backward()
    pairs = [(wanted, y), (one.grad, other.grad)]
    there = dict(split.named_parameters())
    pairs += [(p.grad, _full(there[name].grad)) for name, p in whole.named_parameters()]
    return {
        "plan": {path: type(style) for path, style in plan.items()},
        "apart": max(float((a - b).detach().abs().max() / a.detach().abs().max()) for a, b in pairs),
        "sent": [dict(each.counts) for each in (forward, backward)],
        "share": {name: p.to_local().shape for name, p in split.named_parameters() if isinstance(p, DTensor)},
        "split": split,
    }


def _full(value: Any) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def _said(call: Callable[[], object]) -> str:
    try:
        call()
    except dr.DynrankError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def _everything(rank: int) -> dict[str, Any]:
    done: dict[str, Any] = {}
    for form in dr.Form:
        net = net_of(Products, form=form)
        done[f"{form.name}, truncated"] = compared(dr.truncate(net))
        done[f"{form.name}, in LOW"] = compared(net)
    sharded = done["GRAPH, in LOW"]["split"]
    done["to FULL"] = _said(lambda: dr.enter_(sharded, dr.Phase.FULL))
    optimizer = torch.optim.AdamW(sharded.parameters())
    optimizer.step()
    done["to FULL with an optimizer"] = _said(lambda: dr.enter_(sharded, dr.Phase.FULL, optimizer))
    done["phases"] = set(dr.phases_of(sharded).values())
    odd = dr.truncate(dr.transform(nn.Linear(16, 32), (torch.randn(5, 16),), rank=dr.Fixed(3)), [(torch.randn(9, 16),)])
    mesh = init_device_mesh("cpu", (2,))
    done["odd"] = _said(lambda: parallelize_module(odd, mesh, dr.rank_parallel_plan(odd)))
    for each in done.values():
        if isinstance(each, dict):
            del each["split"]
    return done


@pytest.mark.filterwarnings("ignore")
def test_outputs_and_gradients_are_those_of_the_whole_and_a_site_sends_once_each_way() -> None:
    first, second = in_processes(_everything)
    layers = {
        "GRAPH, truncated": ["a", "b", "w"],
        "GRAPH, in LOW": ["a", "b", "w", "o"],
        "LAYERS, truncated": ["a", "b"],
        "LAYERS, in LOW": ["a", "b"],
    }
    for name, paths in layers.items():
        for done in (first[name], second[name]):
            assert done["apart"] < 1e-5, name
            assert {path.removesuffix(".left").removesuffix(".right") for path in done["plan"]} == {
                *paths,
                *(["parts"] if name == "GRAPH, in LOW" else []),
            }
            calls = len(paths) + 2 * (name == "GRAPH, in LOW")  # the weight in parts is used twice
            assert done["sent"] == [{"all_reduce": calls}] * 2, name
    assert first["GRAPH, truncated"]["share"]["a.right.weight"] == (2, 16)
    assert first["GRAPH, truncated"]["share"]["a.left.weight"] == (32, 2)
    assert first["GRAPH, in LOW"]["share"]["a.left"] == (32, 2)
    for done in (first, second):
        assert "DTensor" in done["to FULL"]
        assert done["to FULL"].startswith("TransitionError: a.weight")
        assert done["to FULL with an optimizer"].startswith("TransitionError: a.weight")
        assert done["phases"] == {dr.Phase.LOW}
        assert done["odd"].startswith(
            "PlanError: 2 processes cannot share a rank of 3: give transform or compress mult"
        )


def test_the_factor_that_is_applied_first_is_column_parallel() -> None:
    """A product ``x @ W`` applies its left factor first."""
    plan = dr.rank_parallel_plan(dr.truncate(net_of(Products)))
    assert [(path, isinstance(style, ColwiseParallel)) for path, style in plan.items()] == [
        ("a.right", True),
        ("a.left", False),
        ("b.right", True),
        ("b.left", False),
        ("w.left", True),
        ("w.right", False),
    ]
    assert all(isinstance(style, ColwiseParallel | RowwiseParallel) for style in plan.values())


@pytest.mark.parametrize("form", dr.Form)
def test_what_is_shared_or_no_pair_of_factors_stays_whole(form: dr.Form) -> None:
    net = net_of(Tied, form=form, share_inputs=True, exclude=["left", "right"])
    assert list(dr.rank_parallel_plan(net)) == ["last"]
    assert list(dr.rank_parallel_plan(dr.truncate(net))) == ["last.right", "last.left"]


def test_where_there_is_nothing_to_split_it_says_so() -> None:
    with pytest.raises(dr.PlanError, match=r"^Linear has no linear layer in two factors to split along its rank: give"):
        dr.rank_parallel_plan(nn.Linear(4, 4))
    net = dr.transform(nn.Linear(16, 32), (torch.randn(5, 16),), rank=dr.Fixed(4))
    with pytest.raises(dr.PlanError, match=r"^weight is in FULL: enter LOW first, or truncate the net"):
        dr.rank_parallel_plan(net)
