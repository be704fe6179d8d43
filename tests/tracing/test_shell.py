"""What capture takes: nothing of the caller's model changes, and no weight is copied that is only read."""

from __future__ import annotations

import copy
import gc
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dynrank_fx as dr

HOWS = (None, dr.Capture.SYMBOLIC, dr.Capture.EXPORT, dr.Capture.MODULES)
X = torch.linspace(-1, 1, 48).reshape(6, 8)


class Busy(nn.Module):
    """Forward changes buffers, attributes and, under no_grad, weights; parts are in modes of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 8, max_norm=0.5)
        self.block = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 8))
        self.head = nn.Linear(8, 4)
        self.register_buffer("steps", torch.zeros(()))
        self.seen: list[int] = []
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.training:
            self.steps += 1
        x = x + self.table(torch.arange(6, device=x.device))
        return self.head(self.block(x)) * self.head.weight.detach().sum()


class Failing(Busy):
    """No way of capture succeeds: the model fails where it is asked to train."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        self.seen.append(1)
        self.block[0].weight.data.mul_(2)
        raise RuntimeError("not on these inputs")


def built(kind: type[Busy]) -> nn.Module:
    torch.manual_seed(0)
    model = kind().train()
    model.block[1].eval()
    model.head.weight.requires_grad_(False)
    for index, parameter in enumerate(model.parameters()):
        if index % 2:
            parameter.grad = torch.full_like(parameter, 0.25)
    return model


def everything(model: nn.Module) -> dict[str, Any]:
    """All that a caller can see of the model, by its bits and its identities."""
    found: dict[str, Any] = {"modes": [module.training for module in model.modules()]}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        found[name] = (id(tensor), tensor.data_ptr(), tensor.requires_grad, tensor.detach().clone())
        found[f"{name}.grad"] = None if tensor.grad is None else (id(tensor.grad), tensor.grad.clone())
        found[f"{name}.hooks"] = dict(tensor._backward_hooks or {})
    for name, module in model.named_modules():
        plain = {key: value for key, value in vars(module).items() if not isinstance(value, dict)}
        found[f"{name}'s attributes"] = copy.deepcopy(plain)
        found[f"{name}'s hooks"] = [dict(module._forward_hooks), dict(module._forward_pre_hooks)]
    found["random"] = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1])
    return found


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


@pytest.mark.parametrize("copies", [True, False], ids=["copy", "shared"])
@pytest.mark.parametrize("how", HOWS, ids=str)
@pytest.mark.parametrize("kind", [Busy, Failing])
def test_the_callers_model_stays_as_it_is_whether_capture_succeeds_or_fails(kind, how, copies):
    model = built(kind)
    model.register_forward_hook(lambda *args: None)
    model.block[0].weight.register_hook(lambda gradient: pytest.fail("a hook of the caller's parameter was called"))
    before = everything(model)
    try:
        net = dr.transform(model, (X,), rank=dr.Fixed(2), how=how, copy=copies)
    except dr.CaptureError:
        assert kind is Failing or how is dr.Capture.SYMBOLIC, "a hook of the model's own is not for symbolic tracing"
    else:
        assert dr.plan_of(net).sites
    after = everything(model)
    assert after.keys() == before.keys()
    for key, value in before.items():
        assert equal(value, after[key]), key


def test_what_is_compiled_inside_is_compiled_after_capture_too():
    inner = nn.Linear(8, 8)
    model = nn.Sequential(nn.Linear(8, 8), torch.compile(inner, backend="eager", fullgraph=True))
    dr.capture(model, (X,))
    with torch.no_grad():
        assert torch.equal(model(X), inner(model[0](X)))


# copy=False


@pytest.mark.parametrize("how", HOWS, ids=str)
def test_a_net_without_a_copy_is_over_the_models_own_parameters_and_buffers(how):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    )
    model[2][2].weight = model[0].weight
    net = dr.transform(model, (X,), rank=dr.Fixed(2), how=how, copy=False)
    assert {id(p) for p in net.parameters()} == {id(p) for p in model.parameters()}
    assert {id(b) for b in net.buffers()} >= {id(b) for b in model.buffers()}
    own = dr.transform(model, (X,), rank=dr.Fixed(2), how=how)
    assert not {p.data_ptr() for p in own.parameters()} & {p.data_ptr() for p in model.parameters()}
    assert torch.equal(net(X), model(X))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    net(X).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    assert torch.equal(net.eval()(X), model.eval()(X)), "training the net trains the model"
    weight = model[0].weight.detach().clone()
    dr.enter_(net, dr.Phase.LOW, optimizer)
    net.train()(X).square().sum().backward()
    optimizer.step()
    assert torch.equal(model[0].weight, weight), "what is in LOW has left the model's weight behind"


def test_graphs_and_nets_can_be_shared_too():
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    for given in (torch.fx.symbolic_trace(model), dr.capture(model, (X,)), torch.export.export(model, (X,)).module()):
        net = dr.capture(given, (X,), copy=False)
        assert [id(p) for p in net.parameters()] == [id(p) for p in given.parameters()]
        own = dr.capture(given, (X,))
        assert not {p.data_ptr() for p in own.parameters()} & {p.data_ptr() for p in given.parameters()}


# Memory, as torch's allocator reports it


class Deep(nn.Module):
    """Forty layers of one width: a weight is a fortieth of the model, and an activation of two rows next to nothing."""

    def __init__(self, branches: bool = False) -> None:
        super().__init__()
        self.layers, self.branches = nn.ModuleList(nn.Linear(256, 256) for _ in range(40)), branches

    def forward(self, x: Tensor) -> Tensor:
        if self.branches and x.shape[-1] > 1000:
            x = -x
        for layer in self.layers:
            x = x + F.silu(layer(x))
        return x if not self.branches or float(x.detach().sum()) < 1e9 else x * 2


def highest(call: Callable[[], Any]) -> int:
    """The most bytes that were live at a moment of the call, above what was live before."""
    gc.collect()  # what other tests have left would be freed in between, and count as less
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        kept = call()
    events = [each for each in profile.kineto_results.events() if each.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda each: each.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    del kept
    return most


SMALL = (torch.randn(2, 256),)


@pytest.mark.parametrize(
    ("copies", "limit"), [(True, 1.3), pytest.param(False, 0.2, marks=pytest.mark.fuzz)], ids=["copy", "shared"]
)
@pytest.mark.parametrize("how", HOWS, ids=str)
def test_transform_takes_one_copy_of_the_weights_or_none(how, copies, limit):
    model = Deep(branches=how is dr.Capture.MODULES)
    weights = sum(p.nbytes for p in model.parameters())
    most = highest(lambda: dr.transform(model, SMALL, rank=dr.Fixed(4), how=how, copy=copies))
    assert copies * weights <= most <= limit * weights


@pytest.mark.fuzz
def test_truncate_and_enter_take_their_result_and_little_more():
    net = dr.transform(Deep(), SMALL, rank=dr.Ratio(0.25))
    weights = sum(p.nbytes for p in net.parameters())
    factors = dr.plan_of(net).low_params / dr.plan_of(net).total_params
    for call in (lambda: dr.truncate(net), lambda: dr.enter_(net, dr.Phase.LOW), lambda: dr.truncate(net)):
        assert highest(call) <= (factors + 0.25) * weights
    assert highest(lambda: dr.enter_(net, dr.Phase.FULL)) <= (1 - factors + 0.25) * weights
