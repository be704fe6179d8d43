"""What follows a truncation: batch norms against torch's own, a fine-tune that comes nearer and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressing import Pictured, pictures
from torch import Tensor, nn

from dynrank_fx.compression import recover_
from dynrank_fx.compression.recover import distance
from dynrank_fx.errors import CalibrationError


def test_recovery_comes_nearer_to_the_dense_model(small: nn.Module) -> None:
    torch.manual_seed(0)
    dense = Pictured().eval()
    held_out = pictures(8)[6:]

    def error(module: nn.Module) -> float:
        with torch.no_grad():
            return sum(float(distance(module(*b), dense(*b))) for b in held_out)

    before, buffers = error(small), {name: b.clone() for name, b in small.named_buffers()}
    losses = recover_(small, dense, pictures(), 40)
    assert len(losses) == 40
    assert error(small) < 0.5 * before
    assert all(torch.equal(b, buffers[name]) for name, b in small.named_buffers())
    assert all(p.grad is None and p.requires_grad for p in small.parameters())


def test_recovery_by_the_users_loss_and_of_some_parameters(small: nn.Module) -> None:
    data = [(x, torch.full((len(x), 4), 3.0)) for (x,) in pictures()]
    kept = {name: p.detach().clone() for name, p in small.named_parameters() if name != "head.left.bias"}

    class FirstOnly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = small

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.inner(x)

    losses = recover_(
        FirstOnly(),
        nn.Identity(),
        data,
        30,
        loss=lambda z, number: (z - data[number][1]).square().mean(),
        names=["inner.head.left.bias"],
    )
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, kept[name]) for name, p in small.named_parameters() if name != "head.left.bias")


def test_a_loss_that_overflows_leaves_the_module_as_it_was(small: nn.Module) -> None:
    before = {name: p.detach().clone() for name, p in small.named_parameters()}
    losses = iter([1.0, 1.0, float("inf")])
    with pytest.raises(CalibrationError, match="is inf at step 2"):
        recover_(small, Pictured(), pictures(), 5, loss=lambda z, number: (z.square().sum() + 1) * next(losses))
    assert all(torch.equal(p, before[name]) for name, p in small.named_parameters())


def test_a_gradient_that_overflows_in_the_last_step_leaves_the_module_as_it_was(small: nn.Module) -> None:
    before = {name: p.detach().clone() for name, p in small.named_parameters()}
    with pytest.raises(CalibrationError, match=r"^the recovery came to weights that are not finite: look for a gradie"):
        recover_(small, Pictured(), pictures(), 1, loss=lambda z, number: (z - z.detach()).abs().sum().sqrt())
    assert all(torch.equal(p, before[name]) for name, p in small.named_parameters())


def test_a_loss_without_a_gradient_is_told_and_leaves_the_module_as_it_was(small: nn.Module) -> None:
    before = {name: p.detach().clone() for name, p in small.named_parameters()}
    steps = iter(range(10))

    def detached_later(z: Tensor, number: int) -> Any:
        return z.square().mean() if next(steps) < 2 else z.detach().square().mean()

    for loss in (detached_later, lambda z, number: 1.0):
        with pytest.raises(CalibrationError, match="the loss of the recovery has no gradient"):
            recover_(small, Pictured(), pictures(), 5, loss=loss)
        assert all(torch.equal(p, before[name]) for name, p in small.named_parameters())


def test_steps_and_names_that_are_none(small: nn.Module) -> None:
    assert recover_(small, Pictured(), pictures(), 0) == []
    with pytest.raises(CalibrationError, match="a recovery of -1 steps is none"):
        recover_(small, Pictured(), pictures(), -1)
    with pytest.raises(CalibrationError, match=r"a recovery of 2\.5 steps is none"):
        recover_(small, Pictured(), pictures(), 2.5)  # type: ignore[arg-type]
    with pytest.raises(CalibrationError, match="no parameter nope: its names are like "):
        recover_(small, Pictured(), pictures(), 1, names="nope")
    with pytest.raises(CalibrationError, match="no parameter nope: its names are like "):
        recover_(small, Pictured(), pictures(), 1, names=["nope"])
