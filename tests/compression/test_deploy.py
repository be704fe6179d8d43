"""What is deployed of a trained net: its own factors, or a cut by the outputs, with the metric of that very module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dynrank_fx as dr
from dynrank_fx.compression import SiteTimes, dense_form, deployed
from dynrank_fx.plan import PlannedSite
from dynrank_fx.timing import Pair


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
    dr.recalibrate_(net, batches())  # statistics of just these data
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


class SlowInFactors(SiteTimes):
    """Says that some sites take longer in factors, and that others cannot be run by themselves."""

    def __init__(self, slow: Sequence[str], unknown: Sequence[str] = ()) -> None:
        super().__init__(cache=None)
        self.slow, self.unknown = slow, unknown

    def pair(self, rows: Sequence[PlannedSite], rank: int) -> Pair | None:
        name = rows[0].site.name
        return None if name in self.unknown else Pair(1.0, 1.0, 1.2 if name in self.slow else 0.8)


def test_a_site_that_is_slower_in_factors_is_the_product_of_those_that_trained() -> None:
    net = trained()
    dr.enter_(net, dr.Phase.LOW)
    found = deployed(net, batches(), metric=refused, measured=0.5, times=SlowInFactors(["first.weight"]))
    torch.testing.assert_close(found.module(*batches()[0]), net.eval()(*batches()[0]), rtol=1e-5, atol=1e-6)
    shapes = {name: tuple(p.shape) for name, p in found.module.named_parameters() if p.ndim == 2}
    assert sorted(shapes.values()) == [(3, 32), (24, 3), (32, 24)]
    assert found.metadata["dynrank_metric"] == "0.5"


@pytest.mark.parametrize("unknown", [(), ("last.weight",)])
def test_a_dense_site_that_would_be_slower_in_factors_is_not_cut(unknown: tuple[str, ...]) -> None:
    net = trained()
    found = deployed(net, batches(), times=SlowInFactors(["first.weight"], unknown))
    weights = [p for p in found.module.parameters() if p.shape == (32, 24)]
    assert len(weights) == 1
    assert torch.equal(weights[0], net.get_submodule("first").weight)
    assert any(p.shape == (3, 32) for p in found.module.parameters())


@pytest.mark.parametrize("phase", list(dr.Phase))
def test_the_dense_form_computes_the_same_and_the_net_stays(phase: dr.Phase) -> None:
    net = trained()
    dr.enter_(net, phase)
    dense = dense_form(net)
    assert set(dr.phases_of(net).values()) == {phase}
    torch.testing.assert_close(dense(*batches()[0]), net.eval()(*batches()[0]), rtol=1e-5, atol=1e-6)
    assert sorted(tuple(p.shape) for p in dense.parameters() if p.ndim == 2) == [(24, 32), (32, 24)]


def test_a_module_that_was_not_transformed_is_told() -> None:
    with pytest.raises(dr.PlanError, match="not made by transform"):
        deployed(nn.Linear(3, 3))
