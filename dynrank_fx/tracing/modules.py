"""Capture module by module: a module that cannot be traced keeps its own code, with its parts captured inside it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..aliases import Args, Function, Kwargs
from ..errors import CaptureError
from ..ops import is_metadata, module_op
from .equivalence import ROUNDING, Effect, Original, difference, difference_from, effect
from .export import export_both_modes
from .inputs import ExampleInputs, Inputs, fresh
from .net import Net, set_submodule, untraced
from .symbolic import closed_layers, trace_symbolically


def capture_parts(root: nn.Module, example_inputs: ExampleInputs, only: Sequence[str] = ()) -> list[str]:
    """Put a Net in the place of every part of ``root`` that can be captured by itself; the names of those parts.

    The largest parts that can be are taken; below one that cannot, its children. Layers of torch's own that hold one
    weight stay as they are: they can be sites without a graph around them. A part is captured only if it gives the
    same bits on what the model gave it for the example inputs, and the model with it still does what it did. only:
    these parts, and no others.
    """
    calls, expected = _calls(root, example_inputs)
    nets: dict[nn.Module, nn.Module] = {}  # a module under several names stays one
    names: list[str] = []
    waiting = list(only) or [name for name, _ in root.named_children()]
    while waiting:
        name = waiting.pop(0)
        part = root.get_submodule(name)
        if isinstance(part, Net | nn.RNNBase) or module_op(part) is not None or not _has_matrix(part):
            continue
        if part not in nets and name in calls:
            net = _captured(part, calls[name])
            if net is not None and _serves(root, name, net, expected, example_inputs):
                nets[part] = net
        if part in nets:
            root.set_submodule(name, nets[part])
            names.append(name)
        elif not only:
            waiting[:0] = [f"{name}.{child}" for child in dict(part.named_children())]
    return names


def capture_layers(root: nn.Module, example_inputs: ExampleInputs) -> list[str]:
    """Put a Net in the place of every layer of the model's own making that holds a matrix, has no layers inside and can
    be traced symbolically, as Hugging Face's Conv1D; the names of those layers.
    """
    own = {
        name: module
        for name, module in root.named_modules()
        if name and not module._modules and module_op(module) is None and _has_matrix(module)
    }
    calls, _ = _calls(root, example_inputs) if own else ({}, None)
    traced = {name: _traced(layer, calls[name]) for name, layer in own.items() if name in calls}
    nets = {name: net for name, net in traced.items() if net is not None}
    for name, net in nets.items():
        for path, module in list(root.named_modules(remove_duplicate=False)):
            if module is own[name]:
                set_submodule(root, path, net)
    return list(nets)


def modules_read(root: nn.Module, example_inputs: ExampleInputs) -> tuple[list[str], list[str]]:
    """The modules, inside captured parts or single layers, whose parameters untraced code reads by itself when it runs
    on the example inputs; and those of which it asks for the dtype, the device or the shape alone.
    """
    nets = [module for module in root.modules() if isinstance(module, Net)]
    layers = [module for _, module in untraced(root) if module_op(module) is not None]
    reads = _Reads([*layers, *(module for net in nets for module in net.modules())])
    with ExitStack() as stack:
        for module in (*nets, *layers):
            stack.callback(module.register_forward_pre_hook(reads.enter, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(reads.leave, always_call=True).remove)
        stack.callback(root.register_forward_pre_hook(reads.begin).remove)
        stack.callback(root.register_forward_hook(reads.end, always_call=True).remove)
        stack.enter_context(reads)
        effect(root, example_inputs, mode=False)
        with suppress(Exception):  # where the model does not train on the example, nothing is read
            effect(root, example_inputs, mode=True)
    named = list(root.named_modules(remove_duplicate=False))
    read = [name for name, module in named if module in reads.modules]
    return read, [name for name, module in named if module in reads.asked - reads.modules]


class _Reads(TorchFunctionMode):
    """Whose parameters are given to functions, or to parts, while the model runs and no part of it does."""

    def __init__(self, holders: Sequence[nn.Module]) -> None:
        super().__init__()
        self.owners: dict[int, list[nn.Module]] = {}
        for module in holders:
            for parameter in module.parameters(recurse=False):
                self.owners.setdefault(id(parameter), []).append(module)
        self.modules: set[nn.Module] = set()
        self.asked: set[nn.Module] = set()
        self.begun = False
        self.running = 0

    def __torch_function__(
        self, function: Function, types: object, args: Args = (), kwargs: Kwargs | None = None
    ) -> object:
        self._note(args, kwargs, self.asked if is_metadata(function) else self.modules)
        return function(*args, **(kwargs or {}))

    def begin(self, *_: object) -> None:
        self.begun = True

    def end(self, *_: object) -> None:
        self.begun = False

    def enter(self, module: nn.Module, args: object, kwargs: object) -> None:
        self._note(args, kwargs, self.modules)
        self.running += not torch.compiler.is_compiling()  # as it is by torch.cond, which allows no such notes

    def leave(self, *_: object) -> None:
        self.running -= not torch.compiler.is_compiling()

    def _note(self, args: object, kwargs: object, modules: set[nn.Module]) -> None:
        if self.begun and not self.running and not torch.compiler.is_compiling():
            for value in pytree.tree_leaves((args, kwargs)):
                modules.update(self.owners.get(id(value), ()))


def _has_matrix(module: nn.Module) -> bool:
    return any(parameter.ndim >= 2 for parameter in module.parameters())


def _calls(root: nn.Module, example_inputs: ExampleInputs) -> tuple[dict[str, Inputs], Effect]:
    """The arguments of the first call of every module, as (args, kwargs), and its effect, on the example inputs."""
    calls: dict[str, Inputs] = {}
    handles = []

    def noting(name: str) -> Callable[[nn.Module, Args, Kwargs], None]:
        def note(module: nn.Module, args: Args, kwargs: Kwargs) -> None:
            calls.setdefault(name, fresh((args, kwargs)))

        return note

    for name, module in root.named_modules(remove_duplicate=False):
        if name and not isinstance(module, torch.jit.ScriptModule):
            handles.append(module.register_forward_pre_hook(noting(name), with_kwargs=True))
    try:
        return calls, effect(root, example_inputs, mode=False)
    finally:
        for handle in handles:
            handle.remove()


def _captured(part: nn.Module, call: Inputs) -> Net | None:
    """The part as a Net over its own parameters, by whichever capture reproduces it; None where neither does."""
    original = Original(part, call)
    if original.lost:
        return None
    traced = _traced(part, call, original)
    if traced is not None:
        return traced
    try:
        net = export_both_modes(_shell(part), part, call)
    except CaptureError:
        return None  # it keeps its own code, and its children are tried
    return net if difference(net, original).size <= ROUNDING else None


def _traced(part: nn.Module, call: Inputs, original: Original | None = None) -> Net | None:
    """The part as a Net by symbolic tracing; None where that does not work, or gives other bits."""
    try:
        net = trace_symbolically(_shell(part), part, call)
    except CaptureError:
        return None
    same = not closed_layers(net) and difference(net, original or Original(part, call)).size == 0
    return net if same else None


def _shell(part: nn.Module) -> nn.Module:
    """The same parameters and submodules in a module of their own: a graph adds what it reads, the part stays."""
    shell = type(part).__new__(type(part))  # not copy.copy, which parametrized modules refuse
    vars(shell).update(vars(part))
    for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
        vars(shell)[name] = copy.copy(vars(part)[name])
    return shell


def _serves(root: nn.Module, name: str, net: Net, expected: Effect, example_inputs: ExampleInputs) -> bool:
    """Whether the model does what it did with the net in the part's place: its code may want more than its forward."""
    part = root.get_submodule(name)
    root.set_submodule(name, net)
    try:
        return difference_from(root, expected, example_inputs, mode=False).size == 0
    finally:
        root.set_submodule(name, part)
