"""What is deployed of a trained net: its own factors, or a cut by the outputs, with the metric of that very module."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dynrank_fx as dr
from dynrank_fx.compression import deployed


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(24, 32), nn.BatchNorm1d(32), nn.Linear(32, 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.norm(self.first(x))))


def batches() -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(32, 24, generator=generator) + 1,) for _ in range(3)]


def trained() -> nn.Module:
    """A net in FULL whose batch norm has seen the data."""
    torch.manual_seed(0)
    net = dr.transform(Net(), batches()[0], rank=dr.Fixed(3))
    for (x,) in batches():
        net(x)
    return net


def error(module: nn.Module, dense: nn.Module) -> float:
    with torch.no_grad():
        return sum(float((module(*b) - dense(*b)).square().sum()) for b in batches())


def refused(module: nn.Module) -> float:
    raise AssertionError("a net in LOW was measured by training")


def test_a_net_in_low_is_deployed_as_it_was_measured() -> None:
    net = trained()
    dr.enter_(net, dr.Phase.LOW)
    found = deployed(net, batches(), metric=refused, measured=0.12345678)
    net.eval()
    assert torch.equal(found.module(*batches()[0]), net(*batches()[0]))
    assert found.metadata == {"dynrank_plan": dr.plan_of(net).to_json(), "dynrank_metric": "0.123457"}
    assert deployed(net, batches(), metric=refused).metadata == {"dynrank_plan": dr.plan_of(net).to_json()}


@pytest.mark.parametrize("low", [(), ("first.weight",)])
def test_dense_sites_are_cut_by_the_outputs_and_the_result_is_scored(low: tuple[str, ...]) -> None:
    """The metric of the end of training is that of another cut."""
    net = trained()
    dr.enter_(net, dict.fromkeys(low, dr.Phase.LOW)) if low else None
    dense = dr.inline(net.eval())
    seen: list[nn.Module] = []

    def metric(module: nn.Module) -> float:
        seen.append(module)
        return -error(module, dense)

    found = deployed(net, batches(), metric=metric, measured=1.0)
    assert seen == [found.module]
    assert found.metadata["dynrank_metric"] == f"{-error(found.module, dense):.6g}"
    plain = deployed(net, metric=lambda module: None)
    assert error(found.module, dense) < error(plain.module, dense)
    assert plain.metadata == {"dynrank_plan": dr.plan_of(net).to_json()}


def test_batch_norms_fit_what_the_cut_layer_gives() -> None:
    net = trained()
    found = deployed(net, batches())
    inside: list[Tensor] = []
    first = found.module.get_submodule("norm")
    with first.register_forward_pre_hook(lambda module, args: inside.append(args[0])):
        for (x,) in batches():
            found.module(x)
    mean = torch.cat(inside).mean(0)
    torch.testing.assert_close(found.module.get_buffer("norm.running_mean"), mean, rtol=1e-4, atol=1e-5)


def test_the_net_is_not_cut_itself() -> None:
    net = trained()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    deployed(net, batches())
    assert set(dr.phases_of(net).values()) == {dr.Phase.FULL}
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())


def test_a_module_that_was_not_transformed_is_told() -> None:
    with pytest.raises(dr.PlanError, match="not made by transform"):
        deployed(nn.Linear(3, 3))
