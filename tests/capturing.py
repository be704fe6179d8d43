"""What the tests of capture share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import dynrank_fx as dr

CAPTURES = (dr.Capture.SYMBOLIC, dr.Capture.EXPORT)


both_captures = pytest.mark.parametrize("how", CAPTURES, ids=lambda how: how.name)


def linears() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8))


class Loops(nn.Module):
    """A loop over the rows of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.fc(row) for row in x])


def same(a: Any, b: Any) -> bool:
    leaves_a, spec_a = pytree.tree_flatten(a)
    leaves_b, spec_b = pytree.tree_flatten(b)
    return spec_a == spec_b and all(
        torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in zip(leaves_a, leaves_b, strict=True)
    )


def assert_alike(net: nn.Module, model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """The same output, buffers and gradients after a training step's forward, and the same output in eval mode."""
    for mode in (True, False):
        results = []
        for each in (model.train(mode), net.train(mode)):
            torch.manual_seed(3)
            each.zero_grad()
            output = each(*args, **kwargs)
            total = sum(t.sum() for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad)
            total.backward()
            results.append((output, {name: p.grad for name, p in each.named_parameters()}, dict(each.named_buffers())))
            each.zero_grad()
        (expected, gradients_e, buffers_e), (got, gradients_g, buffers_g) = results
        assert same(got, expected)
        for name, gradient in gradients_e.items():
            assert (gradient is None) == (gradients_g[name] is None), name
            assert gradient is None or torch.equal(gradients_g[name], gradient), name
        for name, buffer in buffers_e.items():
            assert torch.equal(buffers_g[name], buffer), name
