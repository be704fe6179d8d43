"""Convolutions and transposed convolutions as ops: pure values that apply, split by axes, and count."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch.nn.functional as F

from .op import Op
from .view import Operand, Shape

_CONV: dict[int, Callable[..., Operand]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED: dict[int, Callable[..., Operand]] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


class ConvolutionOp(Op):
    """A convolution, transposed or not, over ``len(stride)`` axes.

    spreads: whether its weight has the inputs along the first axis, which it spreads over the outputs.
    """

    stride: tuple[int, ...]
    groups: int
    spreads: ClassVar[bool]

    @abc.abstractmethod
    def on_axes(self, axes: Iterable[int]) -> ConvolutionOp:
        """The part of it that a kernel of size 1 outside ``axes`` does; bias and groups apart."""

    @property
    @abc.abstractmethod
    def pointwise(self) -> ConvolutionOp:
        """A 1×1 convolution in the same groups."""


@dataclass(frozen=True)
class ConvOp(ConvolutionOp):
    """``x [N, C_in, *in], weight [C_out, C_in/groups, *kernel] -> [N, C_out, *out]`` over ``len(stride)`` axes.

    padding: per axis, or "same". pad and pad_mode: a padding mode other than zeros is an F.pad before the
    convolution, with the amounts in F.pad's own order (last axis first, low and high).
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int = 1
    pad: tuple[int, ...] = ()
    pad_mode: str = "zeros"

    spreads: ClassVar[bool] = False

    def __call__(self, x: Operand, weight: Operand, bias: Operand = None, at: Operand = None) -> Operand:
        if self.pad:
            x = F.pad(x, self.pad, mode=self.pad_mode)
        convolve = _CONV[len(self.stride)]
        return convolve(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    @property
    def kind(self) -> str:
        return f"conv{len(self.stride)}d"

    def on_axes(self, axes: Iterable[int]) -> ConvOp:
        kept, dims = set(axes), range(len(self.stride))
        # F.pad counts axes from the last.
        pad = tuple(amount if len(dims) - 1 - i // 2 in kept else 0 for i, amount in enumerate(self.pad))
        same = self.padding if isinstance(self.padding, str) else None
        return ConvOp(
            stride=tuple(self.stride[i] if i in kept else 1 for i in dims),
            # "same" pads an axis of kernel size 1 by nothing.
            padding=same or tuple(self.padding[i] if i in kept else 0 for i in dims),  # type: ignore[misc]
            dilation=tuple(self.dilation[i] if i in kept else 1 for i in dims),
            groups=self.groups,
            pad=pad if any(pad) else (),
            pad_mode=self.pad_mode if any(pad) else "zeros",
        )

    def depthwise(self, axes: Iterable[int], channels: int) -> ConvOp:
        """The part that a kernel of size 1 outside ``axes`` does, on each of so many channels alone."""
        return replace(self.on_axes(axes), groups=channels)

    @property
    def pointwise(self) -> ConvOp:
        """A 1×1 convolution in the same groups."""
        ones = tuple(1 for _ in self.stride)
        return ConvOp(stride=ones, padding=tuple(0 for _ in ones), dilation=ones, groups=self.groups)

    def output_shape(self, x: Shape, weight: Shape) -> Shape:
        dims = len(self.stride)
        spatial = []
        for i in range(dims):
            size, kernel = x[-dims + i], weight[2 + i]
            if self.padding == "same":
                spatial.append(size)
                continue
            around = 2 * int(self.padding[i])
            if self.pad:
                around += self.pad[2 * (dims - 1 - i)] + self.pad[2 * (dims - 1 - i) + 1]
            spatial.append((size + around - self.dilation[i] * (kernel - 1) - 1) // self.stride[i] + 1)
        return (*x[: -dims - 1], weight[0], *spatial)

    def flops(self, x: Shape, weight: Shape) -> int:
        """Multiplications and additions, two a pair; padding counts as work, as it is done."""
        out = self.output_shape(x, weight)
        return 2 * math.prod(out) * math.prod(weight[1:])


@dataclass(frozen=True)
class ConvTransposeOp(ConvolutionOp):
    """``x [N, C_in, *in], weight [C_in, C_out/groups, *kernel] -> [N, C_out, *out]`` over ``len(stride)`` axes."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    output_padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1

    spreads: ClassVar[bool] = True

    def __call__(self, x: Operand, weight: Operand, bias: Operand = None, at: Operand = None) -> Operand:
        convolve = _TRANSPOSED[len(self.stride)]
        return convolve(x, weight, bias, self.stride, self.padding, self.output_padding, self.groups, self.dilation)

    @property
    def kind(self) -> str:
        return f"conv_transpose{len(self.stride)}d"

    def on_axes(self, axes: Iterable[int]) -> ConvTransposeOp:
        kept, dims = set(axes), range(len(self.stride))
        return ConvTransposeOp(
            stride=tuple(self.stride[i] if i in kept else 1 for i in dims),
            padding=tuple(self.padding[i] if i in kept else 0 for i in dims),
            output_padding=tuple(self.output_padding[i] if i in kept else 0 for i in dims),
            dilation=tuple(self.dilation[i] if i in kept else 1 for i in dims),
            groups=self.groups,
        )

    @property
    def pointwise(self) -> ConvTransposeOp:
        """A 1×1 convolution in the same groups, its weight [C_in, C_out/groups, 1, ...]."""
        return self.on_axes(())

    def output_shape(self, x: Shape, weight: Shape) -> Shape:
        dims = len(self.stride)
        spatial = tuple(
            (x[-dims + i] - 1) * self.stride[i]
            - 2 * self.padding[i]
            + self.dilation[i] * (weight[2 + i] - 1)
            + self.output_padding[i]
            + 1
            for i in range(dims)
        )
        return (*x[: -dims - 1], weight[1] * self.groups, *spatial)

    def flops(self, x: Shape, weight: Shape) -> int:
        """Multiplications and additions, two a pair: every input number meets the kernels of its channel."""
        return 2 * math.prod(x) * math.prod(weight[1:])
