"""What is changed inside a context is put back: by it, or by what runs in it."""

from __future__ import annotations

import copy

import pytest
import torch
from capturing import assert_alike
from torch import Tensor, nn

import dynrank_fx as dr
from dynrank_fx.tracing import same_values


def test_weights_that_forward_writes_to_are_put_back_through_whatever_view():
    class Writing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(5, 4, max_norm=0.1)
            self.parts = nn.ModuleList(nn.Linear(4, 4) for _ in range(5))

        @torch.no_grad()
        def forward(self, x: Tensor) -> Tensor:
            a, b, c, d, e = self.parts
            a.weight.data.clamp_(0, 0.1)
            b.weight[0], c.weight.mT[1:] = 7, 8
            b.bias += 1
            torch._foreach_mul_([c.bias, d.weight], 2.0)
            torch.ops.aten.mul_.Tensor(d.bias, 3.0)
            torch.add(e.bias, 1, out=e.bias)
            return self.table(x)

    model = Writing()
    before = copy.deepcopy(model.state_dict())
    with same_values(model):
        model(torch.tensor([1, 2]))
        changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert changed == [name for name in before if name not in ("parts.0.bias", "parts.4.weight")]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Sampling(nn.Module):
    """torch.distributions checks its arguments by their values, which no tracer can."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.spread = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.distributions.Normal(self.mean(x), self.spread(x).exp()).rsample()


def test_distributions_can_be_exported_and_are_checked_as_before_afterwards(monkeypatch):
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", True)  # torch.compile turns it off
    model, x = Sampling(), torch.randn(4, 8)
    net = dr.capture(model, (x,), how=dr.Capture.EXPORT)
    assert_alike(net, model, torch.randn(5, 8))
    with pytest.raises(ValueError, match="constraint"):
        torch.distributions.Normal(torch.zeros(1), -torch.ones(1))
