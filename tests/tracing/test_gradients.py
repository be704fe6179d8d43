"""Sketches of gradients: a wrong gradient shows in them, and rounding does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dynrank_fx.tracing.gradients import TOLERANCE, Sketch, sketched, wrong_gradient


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
