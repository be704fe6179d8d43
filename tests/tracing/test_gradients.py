"""Sketches of gradients: a wrong gradient shows in them, and rounding does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynrank_fx.tracing.gradients import TOLERANCE, Sketch, sketched, sketched_gradients, wrong_gradient


def off(gradient: Tensor, change: Callable[[Tensor], Any]) -> str:
    other = gradient.clone()
    change(other)
    return wrong_gradient({"w": sketched(gradient)}, {"w": sketched(other)})


def test_a_sketch_shows_what_is_wrong_with_a_gradient_and_lets_rounding_pass():
    torch.manual_seed(0)
    gradient = torch.randn(200, 300)
    largest = float(gradient.abs().max())
    assert sketched(gradient).sums.nbytes < gradient.nbytes / 31
    assert sketched(gradient).largest == largest
    assert not off(gradient, lambda other: other.mul_(1 + 1e-6 * torch.randn_like(other)))
    step = 2 * TOLERANCE * largest
    assert off(gradient, lambda other: other.add_(step)) == "w"
    assert off(gradient, lambda other: other.mul_(1.01)) == "w"
    assert off(gradient, lambda other: other[3].zero_()) == "w"
    assert off(gradient, lambda other: other[:, -1].add_(step)) == "w"
    assert off(gradient, lambda other: other.copy_(other.flip(0))) == "w"
    found = sum(bool(off(gradient, lambda other, i=i: other.view(-1)[i : i + 1].add_(step))) for i in range(64))
    assert found >= 56, "one wrong value escapes once in 16 times at most"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.complex64])
def test_sketches_are_of_every_kind_of_gradient(dtype):
    torch.manual_seed(0)
    gradient = torch.randn(7, 11).to(dtype)
    assert not off(gradient, lambda other: None)
    assert off(gradient, lambda other: other[-1, -1:].add_(1)) == "w"
    gradient[0, 0] = float("nan")
    assert not off(gradient, lambda other: None), "NaN is equal to itself"
    assert off(gradient, lambda other: other[-1, -1:].add_(1)) == "w"
    assert wrong_gradient({"a": sketched(gradient)}, {"b": sketched(gradient)}) == "a"
    assert isinstance(sketched(torch.zeros(0)), Sketch)


class Partly(nn.Module):
    """A weight used twice, a frozen one, one that nothing depends on, and a table with a sparse gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.frozen, self.unused = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.table = nn.Embedding(9, 6, sparse=True)
        self.frozen.requires_grad_(False)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x = self.twice(torch.tanh(self.twice(self.table(tokens))))
        return x, self.frozen(x).sum()


def test_the_sketches_of_a_model_are_those_of_the_gradients_of_the_sum_of_squares():
    torch.manual_seed(0)
    model, tokens = Partly(), torch.tensor([1, 4, 4, 7])
    found = sketched_gradients(model, model(tokens))
    assert set(found) == {"twice.weight", "twice.bias", "table.weight"}
    x, total = model(tokens)
    (x.square().sum() + total.square()).backward()
    expected = {name: p.grad.to_dense() for name, p in model.named_parameters() if p.grad is not None}
    assert not wrong_gradient({name: sketched(gradient) for name, gradient in expected.items()}, found)
    for name, gradient in expected.items():
        assert found[name].largest == pytest.approx(float(gradient.abs().max()), rel=1e-5)


def test_sketching_leaves_no_gradient_and_no_hook_behind():
    model = nn.Linear(3, 3)
    assert sketched_gradients(model, [model(torch.ones(2, 3))])
    assert all(p.grad is None and not p._backward_hooks for p in model.parameters())
    with pytest.raises(RuntimeError, match="does not require grad"):
        sketched_gradients(model, [torch.ones(3)])
    assert not any(p._backward_hooks for p in model.parameters()), "after an error too"


def test_where_nothing_trains_there_is_nothing_to_compare():
    model = nn.Linear(3, 3)
    assert sketched_gradients(model, []) == {}
    assert sketched_gradients(model.requires_grad_(False), [model(torch.ones(2, 3))]) == {}
    assert wrong_gradient({}, {}) == ""


def test_a_gradient_that_is_small_beside_the_others_may_be_rounding_of_them():
    large, small = torch.full((4,), 1e4), torch.full((4,), 1e-4)
    expected = {"large": sketched(large), "small": sketched(small)}
    got = {"large": sketched(large), "small": sketched(torch.zeros(4))}
    assert wrong_gradient(expected, got) == ""
    alone = {"small": expected["small"]}
    assert wrong_gradient(alone, {"small": got["small"]}) == "small"
    assert wrong_gradient(expected, alone) == "large", "missing"
