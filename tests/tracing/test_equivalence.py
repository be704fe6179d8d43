"""A captured net does what its model does where its outputs would not tell: inputs left out, gradients, types."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from models import gradients
from torch import Tensor, nn

import dynrank_fx as dr

X = torch.randn(4, 5, 8)


class Two(nn.Module):
    """Two layers for a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)


class Hooked(Two):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if x.requires_grad:
            x.register_hook(lambda gradient: 10 * gradient)
        return self.b(x)


def test_gradients_that_forward_changes_stay_changed():
    torch.manual_seed(0)
    model = Hooked()
    net = dr.capture(model, (X,))
    expected, found = gradients(model, X), gradients(net, X)
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
    with pytest.raises(dr.CaptureError, match=r"gives a\.weight another gradient"):
        dr.capture(model, (X,), how=dr.Capture.EXPORT)


class Looked(Hooked):
    """As well, behind a table whose gradient is sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 8, sparse=True)

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(self.table(tokens))


def test_a_model_with_a_sparse_gradient_is_compared_in_training_too():
    torch.manual_seed(0)
    model, tokens = Looked(), torch.tensor([1, 4, 4])
    with pytest.raises(dr.CaptureError, match=r"gives [\w.]+ another gradient"):
        dr.capture(model, (tokens,), how=dr.Capture.EXPORT)
    net = dr.capture(model, (tokens,))
    expected, found = gradients(model, tokens), gradients(net, tokens)
    assert found["table.weight"].is_sparse
    assert all(torch.equal(found[name].to_dense(), gradient.to_dense()) for name, gradient in expected.items())


class Detached(torch.autograd.Function):
    """Its backward gives nothing back, so that what comes before does not train."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> None:
        return None


@dataclasses.dataclass
class Result:
    scores: Tensor


class Returning(Two):
    def forward(self, x: Tensor) -> Result:
        return Result(self.b(Detached.apply(self.a(x))))


def test_gradients_behind_a_dataclass_count_too():
    torch.manual_seed(0)
    model = Returning()
    net = dr.capture(model, (X,))
    for each in (model, net):
        each(X).scores.sum().backward()
        assert each.get_parameter("a.weight").grad is None
        assert each.get_parameter("b.weight").grad is not None


class Penalised(Two):
    """Reads a weight by itself while it trains, and branches on data."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x))
        y = y * 0 if float(y.detach().sum()) > 1e9 else y
        return y + self.a.weight.square().mean() if self.training else y


def test_a_weight_that_is_read_in_training_only_is_read():
    plan = dr.plan_of(dr.transform(Penalised(), (X,), rank=dr.Fixed(2)))
    assert [row.site.name for row in plan.sites] == ["b.weight"]
    assert [row.name for row in plan.skipped] == ["a.weight"]


class Generating(Two):
    def forward(self, x: Tensor) -> Tensor:
        noise = torch.randn(x.shape[1], 8, generator=torch.Generator().manual_seed(1))
        return self.b(self.a(x)) + noise


@pytest.mark.parametrize("model", [Generating(), nn.Sequential(torch.jit.script(nn.Linear(8, 8)), nn.Linear(8, 8))])
@pytest.mark.filterwarnings("ignore")
def test_what_no_graph_can_hold_is_left_to_the_models_code(model):
    net = dr.capture(model, (X,))
    assert torch.equal(net(X), model(X))
