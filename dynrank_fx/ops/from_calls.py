"""Which functional, aten and method calls of a graph are an op on a given weight, with which settings and operands."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import fx

from .conv import ConvOp, ConvTransposeOp
from .from_modules import padding, per_axis
from .from_views import Given
from .matrix import EinsumOp, EmbeddingOp, LinearOp, MatmulOp
from .op import Op
from .view import WHOLE, Shape, View

_aten = torch.ops.aten

_LINEAR = {F.linear, _aten.linear.default}
_MATMUL = {
    *(torch.matmul, torch.mm, torch.bmm, operator.matmul),
    *(_aten.matmul.default, _aten.mm.default, _aten.bmm.default),
    *("matmul", "mm", "bmm", "__matmul__"),
}
_ADDMM = {torch.addmm, _aten.addmm.default, "addmm"}
_BADDBMM = {torch.baddbmm, _aten.baddbmm.default, "baddbmm"}
_EINSUM = {torch.einsum, _aten.einsum.default}
_CONV: dict[object, int] = {
    **dict.fromkeys((F.conv1d, _aten.conv1d.default, _aten.conv1d.padding), 1),
    **dict.fromkeys((F.conv2d, _aten.conv2d.default, _aten.conv2d.padding), 2),
    **dict.fromkeys((F.conv3d, _aten.conv3d.default, _aten.conv3d.padding), 3),
}
_TRANSPOSED: dict[object, int] = {
    **dict.fromkeys((F.conv_transpose1d, _aten.conv_transpose1d.default), 1),
    **dict.fromkeys((F.conv_transpose2d, _aten.conv_transpose2d.input), 2),
    **dict.fromkeys((F.conv_transpose3d, _aten.conv_transpose3d.input), 3),
}


@dataclass(frozen=True)
class Call:
    """An op applied in a graph: its operands as they stand there (nodes, or None for no bias)."""

    op: Op
    x: Given
    bias: Given = None


def call_of(node: fx.Node, weight: fx.Node, view: View, shape: Shape) -> Call | None:
    """The op that ``node`` applies to a weight, or None where it is no product of one input with it.

    weight: the node that gives the weight, or the part of it that ``view`` describes; shape: of what it gives.
    """
    if node.op not in ("call_function", "call_method") or sum(weight is n for n in _flat(node)) != 1:
        return None
    for targets, read in _READERS:
        if node.target in targets:
            call = read(node, weight, view, shape)
            return call if call is not None and isinstance(call.x, fx.Node) and call.x is not weight else None
    return None


def _flat(node: fx.Node) -> list[fx.Node]:
    """The node's inputs, each as often as it stands there."""
    inputs: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), lambda n: inputs.append(n) or n)  # type: ignore[func-returns-value]
    return inputs


def _named(node: fx.Node, *names: str) -> dict[str, Given]:
    """The operands by name, given by position or by name."""
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def _linear(node: fx.Node, weight: fx.Node, view: View, shape: Shape) -> Call | None:
    given = _named(node, "input", "weight", "bias")
    # A vector of weights ([n] instead of [m, n]) is a dot product, not a matrix.
    if given.get("weight") is not weight or len(shape) != 2:
        return None
    return Call(LinearOp(view), given["input"], given.get("bias"))


def _matmul(node: fx.Node, weight: fx.Node, view: View, shape: Shape) -> Call | None:
    a, b = _operands(node, "input", "other", "mat2")
    return Call(MatmulOp(view, weight_first=a is weight, batched=len(shape) > 2), b if a is weight else a)


def _addmm(node: fx.Node, weight: fx.Node, view: View, shape: Shape) -> Call | None:
    bias, a, b = _operands(node, "input", "mat1", "batch1", "mat2", "batch2")
    scales: dict[str, Given] = {name: node.kwargs.get(name, 1) for name in ("beta", "alpha")}
    if bias is weight or _has_node([*scales.values()]):
        return None
    # Not by the shape: a number that the graph computes takes one matrix of a stack, and reads as gathered.
    op = MatmulOp(view, weight_first=a is weight, batched=node.target in _BADDBMM, **scales)
    return Call(op, b if a is weight else a, bias)


def _operands(node: fx.Node, *names: str) -> list[Given]:
    """The tensors in their order, given by position or by one of these names."""
    return [*node.args, *(node.kwargs[name] for name in names if name in node.kwargs)]


def _einsum(node: fx.Node, weight: fx.Node, view: View, shape: Shape) -> Call | None:
    equation, *rest = node.args
    operands = list(rest[0]) if len(rest) == 1 and isinstance(rest[0], list | tuple) else rest
    if view != WHOLE or not isinstance(equation, str) or len(operands) != 2:
        return None
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    subscripts = inputs.split(",")
    position = 0 if operands[0] is weight else 1
    w, x = subscripts[position], subscripts[1 - position]
    op = EinsumOp(x, w, out, weight_first=position == 0)
    letters = re.sub(r"[^A-Za-z]", "", x)
    dots = ("." in x) == ("." in out)
    plain = arrow and dots and "." not in w and len(set(w)) == len(w) and len(set(letters)) == len(letters)
    # Every axis of the weight meets x or the output, and every axis of x the weight or the output: no lone sums.
    if not plain or not set(w) <= set(x) | set(out) or not set(letters) <= set(w) | set(out):
        return None
    return Call(op, operands[1 - position]) if op.axes[1] and op.axes[2] else None


def _embedding(node: fx.Node, weight: fx.Node, view: View, shape: Shape) -> Call | None:
    names: tuple[str, ...]
    if node.target is F.embedding:
        names = ("x", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
    else:
        names = ("weight", "x", "padding_idx", "scale_grad_by_freq", "sparse")
    given = _named(node, *names)
    x = given.get("x", given.get("input", given.get("indices")))
    if given.get("weight") is not weight or given.get("max_norm") is not None or len(shape) != 2:
        return None
    index = given.get("padding_idx")
    if node.target is F.embedding and index is not None and index < 0:
        index += shape[0]
    settings = {key: bool(given.get(key, False)) for key in ("scale_grad_by_freq", "sparse")}
    return Call(EmbeddingOp(view, None if index is None or index < 0 else index, **settings), x)


def _conv(node: fx.Node, weight: fx.Node, view: View, shape: Shape) -> Call | None:
    given = _named(node, "input", "weight", "bias", "stride", "padding", "dilation", "groups")
    settings = {key: given.get(key, default) for key, default in (("stride", 1), ("padding", 0), ("dilation", 1))}
    dims, groups = _CONV[node.target], given.get("groups", 1)
    if given.get("weight") is not weight or view != WHOLE or _has_node([*settings.values(), groups]):
        return None
    op = ConvOp(
        stride=per_axis(settings["stride"], dims),
        padding=padding(settings["padding"], dims),
        dilation=per_axis(settings["dilation"], dims),
        groups=int(groups),
    )
    return Call(op, given["input"], given.get("bias"))


def _conv_transpose(node: fx.Node, weight: fx.Node, view: View, shape: Shape) -> Call | None:
    given = _named(node, "input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
    defaults = {"stride": 1, "padding": 0, "output_padding": 0, "dilation": 1}
    settings = {key: given.get(key, default) for key, default in defaults.items()}
    dims, groups = _TRANSPOSED[node.target], given.get("groups", 1)
    if given.get("weight") is not weight or view != WHOLE or _has_node([*settings.values(), groups]):
        return None
    axes = {key: per_axis(value, dims) for key, value in settings.items()}
    return Call(ConvTransposeOp(**axes, groups=int(groups)), given["input"], given.get("bias"))


def _has_node(value: object) -> bool:
    return isinstance(value, fx.Node) or (isinstance(value, list | tuple) and any(_has_node(v) for v in value))


_Reader: TypeAlias = Callable[[fx.Node, fx.Node, View, Shape], Call | None]
_READERS: tuple[tuple[Container[object], _Reader], ...] = (
    (_LINEAR, _linear),
    (_MATMUL, _matmul),
    (_ADDMM | _BADDBMM, _addmm),
    (_EINSUM, _einsum),
    ({F.embedding, torch.embedding, _aten.embedding.default}, _embedding),
    (_CONV, _conv),
    (_TRANSPOSED, _conv_transpose),
)
