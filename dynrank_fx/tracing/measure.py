"""One run of a net's evaluation graph on the example inputs: shapes and FLOPs, without side effects."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn
from torch.fx.node import Target
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.hooks import RemovableHandle

from ..aliases import Args, Kwargs, Output
from ..errors import CaptureError, first_line
from ..ops import Shape, module_op
from .inputs import ExampleInputs, fresh, split_inputs
from .isolation import same_buffers, same_randomness, same_values, slow_attention
from .nested import leaves
from .net import Net, same_modes, untraced


@dataclass
class Measured:
    """shapes: of every node that gives one tensor, and of the input of every layer that untraced code calls, for each
    time that it is run. flops: of the whole model for the example inputs.
    """

    shapes: dict[fx.Node | nn.Module, list[Shape]] = field(default_factory=dict)
    flops: int = 0

    def note(self, at: fx.Node | nn.Module, value: object) -> None:
        """One more run of it, which gave (or, for a layer, took) this value."""
        if isinstance(value, Tensor):
            self.shapes.setdefault(at, []).append(tuple(value.shape))


class _Recorder(fx.Interpreter):
    def __init__(self, net: Net, measured: Measured) -> None:
        super().__init__(net, graph=net.graphs[False])
        self.measured = measured

    def run_node(self, n: fx.Node) -> object:
        result = super().run_node(n)
        self.measured.note(n, result)
        return result

    def call_module(self, target: Target, args: Args, kwargs: Kwargs) -> object:
        assert isinstance(target, str)
        # A captured part inside the graph is recorded too.
        part = self.module.get_submodule(target)
        return _record(part, args, kwargs, self.measured) if isinstance(part, Net) else part(*args, **kwargs)

    def call_function(self, target: Target, args: Args, kwargs: Kwargs) -> object:
        assert callable(target)
        args, kwargs = _own_lists((args, kwargs))
        return target(*args, **kwargs)


def _own_lists(value: Output) -> Output:
    """With new lists, as in generated code: functions may write to theirs."""
    if isinstance(value, list):
        return [_own_lists(item) for item in value]
    if type(value) is tuple:
        return tuple(_own_lists(item) for item in value)
    return {key: _own_lists(item) for key, item in value.items()} if isinstance(value, dict) else value


def _record(net: Net, args: Args, kwargs: Kwargs, measured: Measured) -> object:
    graph = net.graphs[False]
    values = _placeholders(graph, args, kwargs)
    result = _Recorder(net, measured).run(*values, enable_io_processing=False)
    return graph.process_outputs(result)


def measure(net: nn.Module, example_inputs: ExampleInputs) -> Measured:
    """Shapes and FLOPs of the evaluation graph (torch.utils.flop_counter) on the example inputs.

    Raises CaptureError where the inputs do not fit the graph.
    """
    args, kwargs = fresh(split_inputs(example_inputs))
    if isinstance(net, Net):
        _placeholders(net.graphs[False], args, kwargs)
    measured, counter = Measured(), flop_counter()
    with same_modes(net):
        for module in net.modules():
            module.training = False
        # Real tensors, not fake ones: those take a hundred times as long per operation, and cannot branch on data.
        with ExitStack() as stack:
            for context in (torch.no_grad(), same_randomness(), same_values(net), same_buffers(net), slow_attention()):
                stack.enter_context(context)
            stack.enter_context(counter)
            stack.enter_context(_watched(net, measured))
            try:
                if isinstance(net, Net):
                    _record(net, args, kwargs, measured)
                else:
                    net(*args, **kwargs)
            except (RuntimeError, TypeError, ValueError, LookupError, AssertionError) as error:
                raise CaptureError(
                    f"the net fails on the example inputs ({first_line(error)}): give such as it takes"
                ) from error
    measured.flops = counter.get_total_flops()
    return measured


class _NoModules:
    """In place of the counter's record of who calls what: it hooks into autograd, and fails where forward switches
    gradients on or is given a parameter.
    """

    parents = frozenset({"Global"})

    def __enter__(self) -> None: ...

    def __exit__(self, *exception: object) -> None: ...


def _attention_flops(query: Shape, key: Shape, value: Shape, *_: object, **__: object) -> int:
    """Of both products; torch counts them for CUDA's kernels alone."""
    batch, heads, rows, width = query
    return 2 * batch * heads * rows * key[-2] * (width + value[-1])


def _vector_flops(matrix: Shape, vector: Shape, *_: object, **__: object) -> int:
    """FLOPs of a matrix times a vector, which torch counts as nothing."""
    return 2 * math.prod(matrix)


def flop_counter() -> FlopCounterMode:
    """A context that counts FLOPs, those of the CPU's attention kernel and of vectors too: ``get_total_flops()``."""
    aten = torch.ops.aten
    kernels = {aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops, aten.mv: _vector_flops}
    counter = FlopCounterMode(display=False, custom_mapping=kernels)
    counter.mod_tracker = _NoModules()  # type: ignore[assignment]
    return counter


@contextmanager
def _watched(root: nn.Module, measured: Measured) -> Iterator[None]:
    """Untraced code runs as it is: its captured parts are recorded, and the inputs of its layers noted."""
    handles: list[RemovableHandle] = []
    parts = [] if isinstance(root, Net) else [module for module in root.modules() if isinstance(module, Net)]

    def recorded(net: Net) -> Callable[..., object]:
        return lambda *args, **kwargs: _record(net, args, kwargs, measured)

    def note(module: nn.Module, args: Args) -> None:
        measured.note(module, args[0] if args else None)

    try:
        for net in parts:
            vars(net)["forward"] = recorded(net)
        for _, module in untraced(root):
            if module_op(module) is not None:
                handles.append(module.register_forward_pre_hook(note))
        yield
    finally:
        for net in parts:
            vars(net).pop("forward", None)
        for handle in handles:
            handle.remove()


def _placeholders(graph: fx.Graph, args: Args, kwargs: Kwargs) -> list[object]:
    """One value per placeholder, in order."""
    codegen = graph._codegen
    if isinstance(codegen, fx.graph._PyTreeCodeGen):
        spec = codegen.pytree_info.in_spec
        order = spec.child(1).context if spec.num_children == 2 else list(kwargs)
        return leaves((args, {name: kwargs[name] for name in order}))
    values: list[object] = []
    given = list(args)
    for node in graph.nodes:
        if node.op != "placeholder":
            continue
        name = str(node.target)
        if name.startswith("*"):
            values.append(given if name.count("*") == 1 else kwargs)
            given = []
        elif given:
            values.append(given.pop(0))
        elif name in kwargs:
            values.append(kwargs[name])
        elif node.args:
            values.append(node.args[0])
        else:
            raise CaptureError(f"the example inputs have no value for the model's argument {name!r}")
    return values
