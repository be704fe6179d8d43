"""The operations a site can be: pure values that apply, split into stages, and count.

An op takes (input, weight, bias) and holds everything else (stride, padding, ...), so that the same value runs the
dense weight, each factor, and an fx.Proxy when a graph is inlined.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import torch.nn.functional as F

_CONV: dict[int, Callable[..., Any]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}

Shape: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class LinearOp:
    """``x [..., n], weight [m, n] -> [..., m]``."""

    kind = "linear"

    def __call__(self, x: Any, weight: Any, bias: Any = None) -> Any:
        return F.linear(x, weight, bias)

    @property
    def groups(self) -> int:
        return 1

    def output_shape(self, x: Shape, weight: Shape) -> Shape:
        return (*x[:-1], weight[0])

    def flops(self, x: Shape, weight: Shape) -> int:
        """Multiplications and additions, two a pair."""
        return 2 * math.prod(x[:-1]) * math.prod(weight)


@dataclass(frozen=True)
class ConvOp:
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

    def __call__(self, x: Any, weight: Any, bias: Any = None) -> Any:
        if self.pad:
            x = F.pad(x, self.pad, mode=self.pad_mode)
        convolve = _CONV[len(self.stride)]
        return convolve(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    @property
    def kind(self) -> str:
        return f"conv{len(self.stride)}d"

    def on_axes(self, axes: Iterable[int]) -> ConvOp:
        """The part of this convolution that a kernel of size 1 outside ``axes`` does; bias and groups apart."""
        kept, dims = set(axes), range(len(self.stride))
        # F.pad counts axes from the last.
        pad = tuple(amount if len(dims) - 1 - i // 2 in kept else 0 for i, amount in enumerate(self.pad))
        same = self.padding if isinstance(self.padding, str) else None
        return ConvOp(
            stride=tuple(self.stride[i] if i in kept else 1 for i in dims),
            # "same" pads an axis of kernel size 1 by nothing.
            padding=same or tuple(self.padding[i] if i in kept else 0 for i in dims),  # type: ignore[arg-type,misc]
            dilation=tuple(self.dilation[i] if i in kept else 1 for i in dims),
            groups=self.groups,
            pad=pad if any(pad) else (),
            pad_mode=self.pad_mode if any(pad) else "zeros",
        )

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


Op: TypeAlias = LinearOp | ConvOp


def op_to_json(op: Op) -> dict[str, Any]:
    """A plain dictionary with the kind of the op and its settings."""
    return {"kind": op.kind, **asdict(op)}


def op_from_json(data: dict[str, Any]) -> Op:
    """The op that ``op_to_json`` described. Raises KeyError or TypeError on anything else."""
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items() if k != "kind"}
    return LinearOp() if data["kind"] == "linear" else ConvOp(**fields)
