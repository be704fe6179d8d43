"""Which modules, functions and aten calls are a linear or a convolution, and with which settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from .ops import ConvOp, LinearOp, Op

_MODULES: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def has_hooks(module: nn.Module) -> bool:
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name) for name in names)


def holds_more(module: nn.Module) -> bool:
    """Whether there is more in the module than a weight and a bias."""
    return bool(module._modules or module._buffers or set(module._parameters) - {"weight", "bias"})


def module_op(module: nn.Module) -> Op | None:
    """The op of a module that is exactly torch's own linear or convolution: weight and bias, and no hooks."""
    if not isinstance(module, _MODULES) or has_hooks(module) or holds_more(module):
        return None
    if module._parameters.get("weight") is None:
        return None
    if isinstance(module, nn.Linear):
        return LinearOp() if type(module).forward is nn.Linear.forward else None
    base = next(c for c in _MODULES if isinstance(module, c))
    if type(module).forward is not base.forward or type(module)._conv_forward is not base._conv_forward:  # type: ignore[attr-defined]
        return None
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    settings: dict[str, Any] = {"stride": module.stride, "dilation": module.dilation, "groups": module.groups}
    if module.padding_mode != "zeros":
        pad = tuple(module._reversed_padding_repeated_twice)
        return ConvOp(padding=tuple(0 for _ in module.stride), pad=pad, pad_mode=module.padding_mode, **settings)
    return ConvOp(padding=_padding(module.padding, len(module.stride)), **settings)


def _padding(padding: Any, dims: int) -> tuple[int, ...] | str:
    return (0,) * dims if padding == "valid" else padding if padding == "same" else _per_axis(padding, dims)


def _per_axis(value: Any, dims: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    return values * dims if len(values) == 1 else values


def operand(node: fx.Node, position: int, name: str) -> Any:
    """An operand of a call, given by position or by name; None where it is not given."""
    return node.args[position] if position < len(node.args) else node.kwargs.get(name)


@dataclass(frozen=True)
class Call:
    """A functional or aten call that is an op: its operands as they stand in the graph (nodes, or None)."""

    op: Op
    x: fx.Node
    weight: Any
    bias: Any


_aten = torch.ops.aten
_LINEAR = {F.linear, _aten.linear.default}
_CONV = {
    **dict.fromkeys((F.conv1d, _aten.conv1d.default, _aten.conv1d.padding), 1),
    **dict.fromkeys((F.conv2d, _aten.conv2d.default, _aten.conv2d.padding), 2),
    **dict.fromkeys((F.conv3d, _aten.conv3d.default, _aten.conv3d.padding), 3),
}
_CONV_ARGS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")


def function_op(node: fx.Node, ndim: int) -> Call | None:
    """The op of a functional or aten call with constant settings, and its operands; None for any other node."""
    if node.op != "call_function":
        return None
    named = dict(zip(_CONV_ARGS, node.args, strict=False)) | dict(node.kwargs)
    x, weight, bias = named.get("input"), named.get("weight"), named.get("bias")
    if node.target in _LINEAR:
        # A vector of weights ([n] instead of [m, n]) is a dot product, not a matrix.
        return Call(LinearOp(), x, weight, bias) if ndim == 2 and isinstance(x, fx.Node) else None
    dims = _CONV.get(node.target)  # type: ignore[call-overload]
    settings = [value for name, value in named.items() if name in _CONV_ARGS[3:]]
    if dims is None or not isinstance(x, fx.Node) or any(_has_node(value) for value in settings):
        return None
    op = ConvOp(
        stride=_per_axis(named.get("stride", 1), dims),
        padding=_padding(named.get("padding", 0), dims),
        dilation=_per_axis(named.get("dilation", 1), dims),
        groups=int(named.get("groups", 1)),  # type: ignore[arg-type]
    )
    return Call(op, x, weight, bias)


def _has_node(value: Any) -> bool:
    return isinstance(value, fx.Node) or (isinstance(value, list | tuple) and any(_has_node(v) for v in value))
