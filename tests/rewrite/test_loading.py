"""States of other phases: what the net becomes, and every half of one refused; contracts hold it for every layer."""

from __future__ import annotations

import copy
import multiprocessing
import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import dynrank_fx as dr
from dynrank_fx.rewrite import switched_modules

FULL, LOW, ADAPTOR = dr.Phase.FULL, dr.Phase.LOW, dr.Phase.ADAPTOR
X = torch.randn(4, 12, generator=torch.Generator().manual_seed(1))


class Whole(nn.Module):
    """As a LightningModule or a wrapper holds a net."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.more = net, nn.Linear(2, 2)


class Branching(nn.Module):
    """Code that cannot be traced around layers: captured module by module."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8)), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x) if float(x.sum()) > 0 else -self.body(x))


def whole() -> nn.Module:
    torch.manual_seed(0)
    return dr.transform(nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8)), (X,), rank=dr.Fixed(2))


def parts() -> nn.Module:
    torch.manual_seed(0)
    return dr.transform(Branching(), (X,), rank=dr.Fixed(2), how=dr.Capture.MODULES, allow_unprofitable=True)


@pytest.mark.parametrize("make", [whole, parts])
@pytest.mark.parametrize("around", [lambda net: net, Whole, AveragedModel, torch.compile])
def test_a_state_is_followed_inside_of_other_modules_too(make: Callable, around: Callable) -> None:
    saved, net = make(), make()
    dr.enter_(saved, LOW)
    around(net).load_state_dict(around(saved).state_dict())
    inner = net if around is not AveragedModel else None
    if inner is None:  # it holds a copy
        outer = AveragedModel(net)
        outer.load_state_dict(AveragedModel(saved).state_dict())
        inner = outer.module
    assert set(dr.phases_of(inner).values()) == {LOW}
    assert torch.equal(inner(X), saved(X))
    dr.enter_(inner, FULL)
    assert torch.allclose(inner(X), saved(X), atol=1e-6)


@pytest.mark.parametrize("make", [whole, parts])
@pytest.mark.parametrize("strict", [True, False])
def test_half_a_site_is_refused_and_nothing_is_changed(make: Callable, strict: bool) -> None:
    saved, net = make(), make()
    dr.enter_(saved, LOW)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    site = list(switched_modules(net))[-1]
    name = site.removesuffix("weight") + "right"
    state = saved.state_dict()
    for wrong, message in (
        ({key: value for key, value in state.items() if key != name}, f"the state has left of {site}, which in FULL"),
        (state | {site: torch.zeros(1)}, f"the state has left, right, weight of {site}"),
        (state | {name: torch.zeros(3, 3)}, f"the state has {site} in LOW with factors of"),
    ):
        with pytest.raises(dr.errors.StoreError, match=message.replace(".", r"\.")):
            net.load_state_dict(wrong, strict=strict)
        assert set(dr.phases_of(net).values()) == {FULL}
        assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_what_a_state_does_not_have_stays_as_it_is() -> None:
    net = whole()
    dr.enter_(net, LOW)
    before = net.get_submodule("0").left
    missing = net.load_state_dict({"0.bias": torch.ones(16)}, strict=False).missing_keys
    assert net.get_submodule("0").left is before
    assert "2.left" in missing
    assert torch.equal(net.get_submodule("0").bias, torch.ones(16))


def test_an_optimizer_that_was_made_before_is_told_at_the_next_switch() -> None:
    saved, net = whole(), whole()
    dr.enter_(saved, LOW)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    net.load_state_dict(saved.state_dict())
    with pytest.raises(dr.TransitionError, match="the optimizer holds no parameter of the sites"):
        dr.enter_(net, LOW, optimizer)


def test_the_truncated_model_loads_as_plain_torch_does() -> None:
    for net in (whole(), parts()):
        dr.enter_(net, LOW)
        small = dr.truncate(net)
        assert not small._load_state_dict_pre_hooks
        copy.deepcopy(small).load_state_dict(small.state_dict())


def _work(net: nn.Module, x: Tensor, queue: multiprocessing.Queue) -> None:
    torch.set_num_threads(1)
    dr.enter_(net, LOW)
    queue.put(net(x).detach().tolist())


@pytest.mark.parametrize("make", [whole, parts])
def test_a_net_goes_to_a_process_that_is_spawned(make: Callable) -> None:
    net = make()
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_work, args=(net, X, queue))
    process.start()
    got = torch.tensor(queue.get(timeout=120))
    process.join()
    assert process.exitcode == 0
    assert process.pid != os.getpid()
    dr.enter_(net, LOW)
    torch.testing.assert_close(got, net(X).detach())


@pytest.mark.parametrize("phase", list(dr.Phase))
def test_torch_saves_a_net_and_calls_it_functionally(phase: dr.Phase, tmp_path) -> None:
    net = whole()
    hooked = []
    net.register_forward_hook(lambda *_: hooked.append(1))
    dr.enter_(net, phase)
    assert torch.equal(copy.deepcopy(net)(X), net(X))
    assert len(hooked) == 2, "a copy has the hooks, as every module of torch"
    net._forward_hooks.clear()
    torch.save(net, tmp_path / "net.pt")
    again = torch.load(tmp_path / "net.pt", weights_only=False)
    assert torch.equal(again(X), net(X))
    values = {name: 2 * value for name, value in net.named_parameters()}
    expected = copy.deepcopy(net)
    for parameter in expected.parameters():
        parameter.data.mul_(2)
    assert torch.equal(torch.func.functional_call(net, values, (X,)), expected(X))


def test_what_copies_modules_for_itself_is_refused_in_words() -> None:
    """Each net has a class of its own, as every GraphModule, so that torch's own function does not take two of them."""
    net = whole()
    with pytest.raises(dr.CaptureError, match="DataParallel copies a module for every batch"):
        net._replicate_for_data_parallel()
    with pytest.raises(dr.TransitionError, match="DataParallel copies a module for every batch"):
        switched_modules(parts())["head.weight"][0]._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match="to be of the same class"):
        torch.func.stack_module_state([net, whole()])
