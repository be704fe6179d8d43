"""Gradients of two modules compared by sketches, one parameter at a time: they are never there all at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

TOLERANCE = 1e-3  # of a gradient's largest value, or of the model's largest: a small one may be rounding of the others
_BLOCK, _SUMS = 127, 4
_AT_ONCE = 2**7  # blocks: what they are multiplied by the signs in takes as much as one small weight


@dataclass(frozen=True)
class Sketch:
    """Of a gradient: its largest finite |value|, and signed sums over its blocks of 127 values, four of each block.

    Two gradients are the same within a tolerance t if all their sums are. With independent signs s_j = ±1, a difference
    d of a block shows, |Σ s_j d_j| > t, with a probability of 1/2 or more wherever one |d_j| > t: of the two values of
    s_j at least one makes it so, whatever the other terms are. A wrong value escapes all four sums once in 16 times at
    most, and a wrong gradient has many. Equal differences never cancel, since there is an odd number of signs. Rounding
    errors add up to about eleven times their size, which makes this test the stricter one. In float32 the sums take a
    thirty-second of the memory of the gradient.
    """

    largest: float
    sums: Tensor


def sketched(gradient: Tensor, sums: Tensor | None = None) -> Sketch:
    """The sketch of a gradient. sums: where they are written to, as ``room_for`` makes it."""
    sums, largest = room_for(gradient) if sums is None else sums, _largest(gradient)
    signs = torch.randint(2, (_SUMS, _BLOCK), generator=torch.Generator().manual_seed(0)) * 2 - 1
    signs = signs.to(gradient.device, gradient.real.dtype)
    done = 0
    for blocks in _blocks(gradient):
        # NaN and infinities stand for numbers of their own, or they would hide the values beside them.
        finite = blocks.nan_to_num(nan=7 * (largest or 1), posinf=11 * (largest or 1), neginf=-13 * (largest or 1))
        rows = sums[done : done + len(blocks)]
        rows.copy_((finite[:, None] * signs[:, : blocks.shape[1]]).sum(-1, dtype=sums.dtype))
        done += len(blocks)
    return Sketch(largest, sums)


def room_for(tensor: Tensor) -> Tensor:
    """For the sums of a tensor: [blocks, 4]."""
    count = tensor.numel() * (2 if tensor.is_complex() else 1)
    dtype = torch.promote_types(tensor.real.dtype, torch.float32)
    return torch.zeros(-(-count // _BLOCK), _SUMS, dtype=dtype, device=tensor.device)


def _blocks(gradient: Tensor) -> Iterator[Tensor]:
    """[count, 127], and at last [1, fewer] where some are left."""
    flat = (torch.view_as_real(gradient) if gradient.is_complex() else gradient).detach().flatten()
    whole = flat.numel() // _BLOCK * _BLOCK
    yield from flat[:whole].view(-1, _BLOCK).split(_AT_ONCE)
    if whole < flat.numel():
        yield flat[None, whole:]


def wrong_gradient(expected: dict[str, Sketch], got: dict[str, Sketch]) -> str:
    """The first parameter whose gradient is missing, or off by more than rounding; empty if there is none."""
    for name in sorted(expected.keys() ^ got.keys()):
        return name
    largest = max((sketch.largest for sketch in expected.values()), default=0.0)
    for name, sketch in expected.items():
        limit = TOLERANCE * max(sketch.largest, TOLERANCE * largest)
        if not torch.allclose(got[name].sums, sketch.sums, rtol=0, atol=limit):
            return name
    return ""


def sketched_gradients(model: nn.Module, outputs: Sequence[Tensor]) -> dict[str, Sketch]:
    """Of the sum of squares of the outputs, for every parameter that they depend on; none where nothing trains."""
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not parameters or not outputs:
        return {}
    sketches: dict[str, Sketch] = {}
    # Before there are gradients: between them, it would leave the heap in holes that no gradient fits into.
    rooms = {name: room_for(parameter.detach()) for name, parameter in parameters.items()}

    def sketching(name: str) -> Callable[[Tensor], Tensor]:
        def hook(gradient: Tensor) -> Tensor:
            dense = gradient if gradient.layout is torch.strided else gradient.to_dense()
            sketches[name] = sketched(dense, rooms[name])
            # Autograd gathers what the hook returns: a zero without memory, of the same kind.
            if dense is not gradient:
                return torch.zeros_like(gradient)
            return torch.zeros((), dtype=gradient.dtype, device=gradient.device).expand(gradient.shape)

        return hook

    handles = [parameter.register_hook(sketching(name)) for name, parameter in parameters.items()]
    try:
        total = torch.stack([tensor.abs().square().sum().double() for tensor in outputs]).sum()
        torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    return {name: sketches[name] for name in parameters if name in sketches}


def _largest(tensor: Tensor) -> float:
    """|value| of the finite ones, without a copy of them where all are."""
    if not tensor.is_complex() and tensor.numel():
        low, high = tensor.detach().aminmax()
        if bool(low.isfinite() & high.isfinite()):
            return max(-float(low), float(high))
    finite = tensor[tensor.isfinite()].abs()
    return float(finite.max()) if finite.numel() else 0.0
