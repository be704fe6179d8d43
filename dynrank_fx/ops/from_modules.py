"""Which modules are ops, and with which settings."""

from __future__ import annotations

from typing import TypeAlias

from torch import nn

from .conv import ConvOp, ConvTransposeOp
from .matrix import EmbeddingOp, LinearOp
from .op import Op
from .view import View

Numbers: TypeAlias = int | list[int] | tuple[int, ...]

_PLAIN: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
_TRANSPOSED: tuple[type[nn.Module], ...] = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
OP_MODULES = _PLAIN + _TRANSPOSED

_TURNED = ("transformers.pytorch_utils", "Conv1D")  # x @ W + b, where nn.Linear has x @ W.T + b


def has_hooks(module: nn.Module) -> bool:
    """Whether code of the user's runs before or after the module's own."""
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name) for name in names)


def holds_more(module: nn.Module) -> bool:
    """Whether there is more in the module than a weight and a bias."""
    return bool(module._modules or module._buffers or set(module._parameters) - {"weight", "bias"})


def module_op(module: nn.Module) -> Op | None:
    """The op of a module that is exactly torch's own layer, or the Conv1D of Hugging Face's transformers: weight and
    bias, its own forward, and no hooks.
    """
    if has_hooks(module) or holds_more(module):
        return None
    if (type(module).__module__, type(module).__name__) == _TURNED and "forward" not in vars(module):
        return LinearOp(View(transposed=True))
    if not isinstance(module, OP_MODULES):
        return None
    base = next(c for c in OP_MODULES if isinstance(module, c))
    own_forward = type(module).forward is not base.forward or "forward" in vars(module)
    if module._parameters.get("weight") is None or own_forward:
        return None
    if isinstance(module, nn.Linear):
        return LinearOp()
    if isinstance(module, nn.Embedding):
        return _embedding(module)
    if isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        settings = (module.stride, module.padding, module.output_padding, module.dilation, module.groups)
        return ConvTransposeOp(*settings)  # type: ignore[arg-type]
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    if type(module)._conv_forward is not base._conv_forward:  # type: ignore[attr-defined]
        return None
    return _convolution(module)


def _embedding(module: nn.Embedding) -> Op | None:
    if module.max_norm is not None:
        return None  # forward writes to the weight
    return EmbeddingOp(
        padding_idx=module.padding_idx, scale_grad_by_freq=module.scale_grad_by_freq, sparse=module.sparse
    )


def _convolution(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> Op:
    dims, zeros = len(module.stride), module.padding_mode == "zeros"
    return ConvOp(
        stride=module.stride,
        padding=padding(module.padding, dims) if zeros else (0,) * dims,
        dilation=module.dilation,
        groups=module.groups,
        pad=() if zeros else tuple(module._reversed_padding_repeated_twice),
        pad_mode=module.padding_mode,
    )


def padding(value: str | Numbers, dims: int) -> tuple[int, ...] | str:
    """The padding of a convolution as ConvOp has it, from any form torch takes."""
    if isinstance(value, str):
        return (0,) * dims if value == "valid" else value
    return per_axis(value, dims)


def per_axis(value: Numbers, dims: int) -> tuple[int, ...]:
    """One number an axis, from one number or several."""
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    return values * dims if len(values) == 1 else values
