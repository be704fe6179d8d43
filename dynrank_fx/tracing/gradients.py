"""Gradients of two modules, compared one parameter at a time: those of the second are never there all at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

_TOLERANCE = 1e-3  # of a gradient's largest value; a small one may be nothing else than rounding of the others
_BLOCK, _SUMS = 64, 4


@dataclass(frozen=True)
class Gradient:
    """What is kept of a gradient. largest: the largest finite |value|. of: makes the same of another gradient."""

    largest: float
    values: Tensor
    of: Callable[[Tensor], Tensor]


Keep: TypeAlias = Callable[[Tensor], Gradient]


def kept(gradient: Tensor) -> Gradient:
    """All of it."""
    return Gradient(_largest(gradient), gradient.detach(), _same)


def sketched(gradient: Tensor) -> Gradient:
    """Signed sums over blocks of 64 values, four of each block: in float32 a sixteenth of the gradient.

    With independent signs s_j = ±1, |Σ s_j d_j| > t has a probability of at least 1/2 where one |d_j| > t: of the two
    values of s_j at least one gives it, whatever the other terms. A wrong value escapes four sums in 1 of 16 cases at
    most, and a wrong gradient has many. Sums of rounding errors grow with the root of the block: the check is a little
    stricter than that of the values themselves.
    """
    return Gradient(_largest(gradient), _signed_sums(gradient), _signed_sums)


def _same(gradient: Tensor) -> Tensor:
    return gradient


def _signed_sums(gradient: Tensor) -> Tensor:
    """[blocks, 4], and one row for the values after the last whole block."""
    flat = (torch.view_as_real(gradient) if gradient.is_complex() else gradient).detach().flatten()
    signs = torch.randint(2, (_SUMS, _BLOCK), generator=torch.Generator().manual_seed(0)).to(flat.device, flat.dtype)
    signs, whole = 2 * signs - 1, len(flat) // _BLOCK * _BLOCK
    dtype = torch.promote_types(flat.dtype, torch.float32)
    parts = ((flat[:whole].view(-1, _BLOCK), signs), (flat[None, whole:], signs[:, : len(flat) - whole]))
    return torch.cat([torch.stack([(x * row).sum(-1, dtype=dtype) for row in s], -1) for x, s in parts])


class Comparison:
    """Is shown the gradients of a module, and says which of them is not what was expected."""

    def __init__(self, expected: Mapping[str, Gradient]) -> None:
        self.expected, self._seen, self._off = expected, set[str](), set[str]()
        self._largest = max((gradient.largest for gradient in expected.values()), default=0.0)

    def __call__(self, name: str, gradient: Tensor) -> None:
        self._seen.add(name)
        expected = self.expected.get(name)
        if expected is None:
            return
        got, scale = expected.of(gradient), max(expected.largest, _TOLERANCE * self._largest)
        if not _within(got, expected.values, _TOLERANCE * scale):
            self._off.add(name)

    @property
    def wrong(self) -> str:
        """The first parameter whose gradient is missing, or off by more than rounding; empty if there is none."""
        missing = sorted(self.expected.keys() ^ self._seen)
        return next(iter([*missing, *(name for name in self.expected if name in self._off)]), "")


def each_gradient(model: nn.Module, outputs: Sequence[Tensor], show: Callable[[str, Tensor], None]) -> None:
    """Show every parameter's gradient of the sum of squares of the outputs, and forget it; none where nothing trains.

    Autograd is given a zero without memory in its place, so that it does not gather what has been shown.
    """
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not parameters or not outputs:
        return

    def showing(name: str) -> Callable[[Tensor], Tensor]:
        def hook(gradient: Tensor) -> Tensor:
            show(name, gradient if gradient.layout is torch.strided else gradient.to_dense())
            return torch.zeros((), dtype=gradient.dtype, device=gradient.device).expand(gradient.shape)

        return hook

    handles = [parameter.register_hook(showing(name)) for name, parameter in parameters.items()]
    try:
        total = torch.stack([tensor.abs().square().sum().double() for tensor in outputs]).sum()
        torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()


def _within(got: Tensor, expected: Tensor, limit: float) -> bool:
    """Whether no value is off by more; infinities and NaN being equal to themselves."""
    found = _finite_largest(got - expected)
    return found <= limit if found is not None else torch.allclose(got, expected, rtol=0, atol=limit, equal_nan=True)


def _largest(tensor: Tensor) -> float:
    """|value| of the finite ones."""
    found = _finite_largest(tensor)
    if found is None:
        finite = tensor[tensor.isfinite()].abs()
        found = float(finite.max()) if finite.numel() else 0.0
    return found


def _finite_largest(tensor: Tensor) -> float | None:
    """Of the |values|, without a copy of them; None where some are not finite, or the numbers are complex."""
    if tensor.is_complex() or not tensor.numel():
        return None
    low, high = tensor.detach().aminmax()
    found = max(-float(low), float(high))
    return found if math.isfinite(found) and low == low else None
