"""Contexts that put back what they change, or what the caller's forward changes inside them."""

from __future__ import annotations

import inspect
import io
import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..aliases import Args, Function, Kwargs, Output
from ..errors import DynrankError
from ..randomness import random_state, set_random_state
from .inputs import Inputs
from .net import set_mode

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
def same_buffers(model: nn.Module, *, but: Iterable[Tensor] = ()) -> Iterator[None]:
    """What forward does to the buffers inside is undone, except to these."""
    kept = {id(buffer) for buffer in but}
    before = [(buffer, buffer.clone()) for buffer in model.buffers() if id(buffer) not in kept]
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
def same_values(model: nn.Module) -> Iterator[None]:
    """What forward writes into parameters inside is undone. Only those that it writes to are copied, just before."""
    keeper = _Keeper(model.parameters())
    try:
        with keeper:
            yield
    finally:
        for storage, before in keeper.kept:
            storage.copy_(before)


class _Keeper(TorchFunctionMode):
    """Keeps what tensors hold when a function is about to write to them, through whatever view.

    It sees what Python code calls, as a mode of torch.overrides. One of dispatch would see more, such as writes of
    scripted modules, but what torch.compile meets under it stays uncompiled for good.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self.waiting = {s._cdata: s for tensor in tensors if (s := _storage(tensor)) is not None}
        self.kept: list[tuple[torch.UntypedStorage, torch.UntypedStorage]] = []

    def __torch_function__(
        self, function: Function, types: object, args: Args = (), kwargs: Kwargs | None = None
    ) -> object:
        kwargs = kwargs or {}
        if not torch.compiler.is_compiling():
            for tensor in _written(function, args, kwargs):
                storage = _storage(tensor)
                if storage is not None and storage._cdata in self.waiting:
                    self.kept.append((storage, storage.clone()))
                    del self.waiting[storage._cdata]
        return function(*args, **kwargs)


_EMBEDDINGS = (nn.functional.embedding, nn.functional.embedding_bag)
_SETTERS = {f"__{name}__" for name in ("setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow")}
_SETTERS |= {f"__{name}__" for name in ("iand", "ior", "ixor", "ilshift", "irshift", "imatmul")}
_HARMLESS = ("requires_grad_", "detach_")


def _written(function: Function, args: Args, kwargs: Kwargs) -> tuple[object, ...]:
    """What a function writes to: its first argument if its name says so, what is given as ``out``, and the rows of an
    embedding that are to have a norm.
    """
    if function in _EMBEDDINGS and (kwargs.get("max_norm") is not None or len(args) > 3):
        return (kwargs.get("weight"), *args[:2])
    name = getattr(function, "__name__", "").partition(".")[0]
    in_place = name in _SETTERS or (name.endswith("_") and not name.endswith("__") and name not in _HARMLESS)
    written = [*args[:1]] if in_place else []
    for each in (*written, kwargs.get("out")):
        written += each if isinstance(each, list | tuple) else [each]
    return tuple(written)


def _storage(tensor: object) -> torch.UntypedStorage | None:
    """None for what has none of its own: no tensor, a sparse one, or a subclass around others."""
    if not isinstance(tensor, Tensor) or type(tensor) not in (Tensor, nn.Parameter):
        return None
    return tensor.untyped_storage() if tensor.layout is torch.strided else None


@contextmanager
def assignments_in_place(root: nn.Module) -> Iterator[None]:
    """What forward assigns to a buffer inside is copied into it, but for the buffers of the root itself: torch.export
    keeps those assignments and forgets the others.
    """

    def copy_into(module: nn.Module, name: str, value: Any) -> Any:  # Any: torch says that such a hook returns nothing
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
    with same_randomness(), same_buffers(root):
        try:
            set_mode(root, mode)
            yield
        finally:
            for module, attributes, dictionaries in before:
                constants = {name: value for name, value in vars(module).items() if name.startswith(_CONSTANT)}
                vars(module).clear()
                vars(module).update(attributes | constants)
                for name, content in dictionaries.items():
                    vars(module)[name].clear()
                    vars(module)[name].update(content)


def _dictionaries(module: nn.Module) -> dict[str, dict[str, object]]:
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


@contextmanager
def named_keywords(model: nn.Module, inputs: Inputs) -> Iterator[None]:
    """Inside, forward has the names of the arguments that it takes by ``**kwargs``: torch.export frees no size of a
    tensor that has no parameter of its own.
    """
    signature, forward = inspect.signature(model.forward), model.forward
    parameters = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
    caught = [name for name in inputs[1] if name not in signature.parameters]
    if len(parameters) == len(signature.parameters) or not caught:
        yield
        return

    def named(*args: object, **kwargs: object) -> Output:
        return forward(*args, **kwargs)

    parameters += [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in caught]
    named.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    before = vars(model).get("forward")
    vars(model)["forward"] = named
    try:
        yield
    finally:
        vars(model).pop("forward")
        if before is not None:
            vars(model)["forward"] = before


def refuse_inference(kind: type[DynrankError], what: str) -> None:
    """Raises such an error where no parameter can be made that trains. what: is to be done elsewhere."""
    if torch.is_inference_mode_enabled():
        raise kind(f"within torch.inference_mode no weight can be made that trains: {what} outside it")
