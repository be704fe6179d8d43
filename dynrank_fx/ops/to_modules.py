"""Torch's own layers for ops: the inverse of reading a module as an op."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor, nn

from .conv import ConvOp, ConvTransposeOp
from .matrix import EmbeddingOp, LinearOp, MatmulOp
from .op import Op
from .view import WHOLE, View

Builder: TypeAlias = Callable[..., nn.Module]
"""Makes a layer, given where its values lie."""

_CONV: dict[int, Builder] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED: dict[int, Builder] = {
    1: nn.ConvTranspose1d,
    2: nn.ConvTranspose2d,
    3: nn.ConvTranspose3d,
}


def layer_of(op: Op, weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Module | None:
    """The layer of torch's own that applies an op with this weight and bias, holding both.

    ``x @ W`` becomes an nn.Linear of Wᵀ, whose weight is then another parameter, see ``keeps_weight``. None where torch
    has no such layer: for parts of a weight, einsum, scaled sums, stacks of matrices, and padding that is not zeros.
    """
    build = _builder(op, weight)
    if build is None:
        return None
    layer = build(device="meta")
    layer._parameters["weight"] = weight if keeps_weight(op) else _transposed(weight)
    if "bias" in layer._parameters:
        layer._parameters["bias"] = bias
    elif bias is not None:
        return None
    return layer


def keeps_weight(op: Op) -> bool:
    """Whether the layer holds the very weight of the op, and not its transpose."""
    return not isinstance(op, MatmulOp) and not (isinstance(op, LinearOp) and op.view.transposed)


def _transposed(weight: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(weight.detach().mT.contiguous(), requires_grad=weight.requires_grad)


def _builder(op: Op, weight: Tensor) -> Builder | None:
    """Makes the layer, its values apart."""
    size = tuple(weight.shape)
    if isinstance(op, LinearOp) and op.view in (WHOLE, View(transposed=True)) and weight.ndim == 2:
        m, n = op.view.shape(size)
        return functools.partial(nn.Linear, n, m)
    if getattr(op, "view", WHOLE) != WHOLE:
        return None
    if isinstance(op, MatmulOp) and weight.ndim == 2 and not op.weight_first and (op.alpha, op.beta) == (1, 1):
        return functools.partial(nn.Linear, size[0], size[1])
    if isinstance(op, EmbeddingOp):
        return functools.partial(
            nn.Embedding,
            size[0],
            size[1],
            op.padding_idx,
            scale_grad_by_freq=op.scale_grad_by_freq,
            sparse=op.sparse,
        )
    if isinstance(op, ConvOp) and not op.pad:
        make, channels, settings = _CONV[len(op.stride)], (size[1] * op.groups, size[0]), {"padding": op.padding}
    elif isinstance(op, ConvTransposeOp):
        make, channels = _TRANSPOSED[len(op.stride)], (size[0], size[1] * op.groups)
        settings = {"padding": op.padding, "output_padding": op.output_padding}
    else:
        return None
    settings |= {"stride": op.stride, "dilation": op.dilation}
    return functools.partial(make, *channels, size[2:], groups=op.groups, **settings)
