"""Contexts that put back what they change, or what the caller's forward changes inside them."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch
from torch import Tensor, nn

from ..randomness import random_state, set_random_state

_KEPT = ("_parameters", "_modules")
_CONSTANT = "_tensor_constant"  # torch.fx's name for a tensor that forward makes


@contextmanager
def same_randomness() -> Iterator[None]:
    """What is drawn inside is drawn again afterwards."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)


@contextmanager
def same_buffers(model: nn.Module) -> Iterator[None]:
    """What forward does to the buffers inside is undone."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    modules = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    held = [(module, dict(module._buffers)) for module in modules]
    try:
        yield
    finally:
        for module, buffers in held:  # forward may have put others in their places
            module._buffers.update(buffers)
        for buffer, value in before:
            buffer.copy_(value)


@contextmanager
def assignments_in_place(root: nn.Module) -> Iterator[None]:
    """What forward assigns to a buffer inside is copied into it, but for the buffers of the root itself: torch.export
    keeps those assignments and forgets the others.
    """

    def copy_into(module: nn.Module, name: str, value: Any) -> Any:
        before = module._buffers.get(name)
        if module._buffers is root._buffers or not isinstance(before, Tensor) or not isinstance(value, Tensor):
            return value
        return before.copy_(value) if (before.shape, before.dtype) == (value.shape, value.dtype) else value

    hook = torch.nn.modules.module.register_module_buffer_registration_hook(copy_into)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def slow_attention() -> Iterator[None]:
    """The attention fast path off: it differs from the ordinary one by rounding and hides its FLOPs. Put back
    afterwards.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def in_mode(root: nn.Module, mode: bool) -> Iterator[None]:
    """The model in this mode; where it is in it already, with the parts that were set apart, such as a batch norm.

    Modes, buffers, attributes and random generators are as before afterwards, whatever forward does to them; only the
    tracer's own constants are added.
    """
    open_ = [module for module in root.modules() if not isinstance(module, torch.jit.ScriptModule)]
    before = [(module, dict(vars(module)), _dictionaries(module)) for module in open_]
    apart = [module for module in root.modules() if module.training != mode] if mode == root.training else []
    with same_randomness(), same_buffers(root):
        try:
            root.train(mode)
            for module in apart:
                module.training = not mode
            yield
        finally:
            for module, attributes, dictionaries in before:
                constants = {name: value for name, value in vars(module).items() if name.startswith(_CONSTANT)}
                vars(module).clear()
                vars(module).update(attributes | constants)
                for name, content in dictionaries.items():
                    vars(module)[name].clear()
                    vars(module)[name].update(content)


def _dictionaries(module: nn.Module) -> dict[str, dict[Any, Any]]:
    """The content of the dictionaries that forward may change in place: buffers, and hooks that it may register."""
    return {name: dict(value) for name, value in vars(module).items() if isinstance(value, dict) and name not in _KEPT}


@contextmanager
def unchecked_distributions() -> Iterator[None]:
    """torch.distributions without the checks of its arguments, which branch on data. Put back afterwards."""
    before = torch.distributions.Distribution._validate_args
    torch.distributions.Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        torch.distributions.Distribution.set_default_validate_args(before)


@contextmanager
def quiet() -> Iterator[None]:
    """torch and the converters warn of their own deprecations, log what is not installed, and log or print what they
    raise anyway: nothing of that is for the caller.
    """
    loggers = [logging.getLogger(name) for name in ("torch", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
