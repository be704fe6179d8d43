"""Capture by torch.export: a graph per mode over the original module tree, true to the inputs it was made for."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import TypeGuard

import torch
from torch import Tensor, fx, nn
from torch.fx.node import Argument
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..aliases import Args, Function, Kwargs
from ..errors import CaptureError, first_line
from .blame import origin
from .inputs import (
    NO_OTHER,
    DynamicShapes,
    ExampleInputs,
    batch_size,
    double_batch_of_one,
    free_dimensions,
    fresh,
    shapes_by_argument,
    split_inputs,
)
from .isolation import assignments_in_place, in_mode, named_keywords, quiet, slow_attention, unchecked_distributions
from .nested import as_dicts, leaves
from .net import Net, finished


def export_both_modes(
    root: nn.Module, model: nn.Module, example_inputs: ExampleInputs | None, dynamic_shapes: DynamicShapes | None = None
) -> Net:
    """The Net over ``root``, a copy of ``model``: a graph for training and one for evaluation over one set of weights.

    dynamic_shapes: as in torch.export; by default every dimension of every tensor is free that the model leaves free.
    Raises CaptureError naming the line that cannot be exported.
    """
    if example_inputs is None:
        raise CaptureError(f"torch.export needs example inputs to trace {type(model).__name__}; pass example_inputs")
    args, kwargs = as_dicts(double_batch_of_one(*fresh(split_inputs(example_inputs))))
    if dynamic_shapes is not None:
        shapes = shapes_by_argument(root, as_dicts(split_inputs(example_inputs)), dynamic_shapes)
        programs = _programs(root, args, kwargs, shapes)
    else:
        try:
            with _ShortFormulas():
                programs = _programs(root, args, kwargs, free_dimensions(args, kwargs))
        except CaptureError:  # some models are exported with a free batch only
            programs = _programs(root, args, kwargs, free_dimensions(args, kwargs, only_first=True))
    graphs = {mode: lift(programs[mode], root, prefix="train" if mode else "eval") for mode in (True, False)}
    for graph in graphs.values():
        _pin_aliases(graph, leaves((args, kwargs)))
    same = alike(graphs[True], graphs[False], root)
    return finished(root, graphs[True], None if same else graphs[False], model)


class _ShortFormulas(TorchFunctionMode):
    """Raises where a size becomes a long formula of the inputs' sizes.

    Windows that are padded, shifted and merged make such of a free height: torch.export then takes minutes, or does not
    end. Sizes of models for which all goes well have at most about a dozen operations.
    """

    LIMIT = 24

    def __torch_function__(
        self, function: Function, types: object, args: Args = (), kwargs: Kwargs | None = None
    ) -> object:
        result = function(*args, **(kwargs or {}))
        for leaf in result if isinstance(result, list | tuple) else (result,):
            for size in leaf.shape if isinstance(leaf, Tensor) else ():
                if isinstance(size, torch.SymInt) and size.node.expr.count_ops() > self.LIMIT:
                    raise ValueError("the sizes become too long formulas of the inputs' sizes")
        return result


def _programs(root: nn.Module, args: Args, kwargs: Kwargs, shapes: DynamicShapes | None) -> dict[bool, fx.GraphModule]:
    """What torch.export makes of the model in either mode."""
    programs = {}
    for mode in (True, False):
        try:
            with (
                quiet(),
                slow_attention(),
                unchecked_distributions(),
                in_mode(root, mode),
                assignments_in_place(root),
                named_keywords(root, (args, kwargs)),
            ):
                program = torch.export.export(root, args, kwargs, dynamic_shapes=shapes)  # type: ignore[arg-type]
            programs[mode] = program.module(check_guards=False)
        except Exception as error:  # torch.export runs forward, and fails in ways of its own
            raise CaptureError(f"{origin(error, root)} cannot be exported: {first_line(error)}.") from error
    return programs


def lift(module: fx.GraphModule, root: nn.Module, prefix: str) -> fx.Graph:
    """The exported graph over the original tree: constants that export lifted come along under names of their own.

    Raises CaptureError for a constant that no graph can keep, such as a generator.
    """
    graph = module.graph
    state = {name for name, _ in root.named_parameters(remove_duplicate=False)}
    state |= {name for name, _ in root.named_buffers(remove_duplicate=False)}
    for node in list(graph.nodes):
        if node.op == "get_attr" and node.target not in state:
            value = module
            for part in str(node.target).split("."):
                value = getattr(value, part)
            name = f"_{prefix}_{str(node.target).replace('.', '_')}"
            if isinstance(value, Tensor):
                root.register_buffer(name, value, persistent=False)
            elif isinstance(value, nn.Module):
                setattr(root, name, value)  # the body of a control-flow operator
            else:
                raise CaptureError(f"forward makes a {type(value).__name__}, which an exported graph cannot keep.")
            node.target = name
        elif node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    settle_inputs(graph)
    return graph


def _follow_the_caller(graph: fx.Graph) -> None:
    """Leave out what torch.export fixed of dtypes and devices: under autocast or on another device they are others.

    What is made on the device of the example is made on that of the first input.
    """
    inputs = [node for node in graph.nodes if node.op == "placeholder" and isinstance(node.meta.get("val"), Tensor)]
    made_on = inputs[0].meta["val"].device if inputs else None
    device: fx.Node | None = None

    def followed(value: object) -> object:
        nonlocal device
        if not isinstance(value, torch.device) or value != made_on:
            return value
        if device is None:
            with graph.inserting_after(inputs[-1]):
                device = graph.call_function(getattr, (inputs[0], "device"))
        return device

    for node in list(graph.nodes):
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            graph.erase_node(node)
        elif node.op == "call_function":
            args, kwargs = pytree.tree_map(followed, (tuple(node.args), dict(node.kwargs)))
            node.args, node.kwargs = args, kwargs


def settle_inputs(graph: fx.Graph) -> None:
    """Follow the caller where torch.export took the example's word for his, and where the graph cannot, refuse him."""
    _follow_the_caller(graph)
    _pin_inputs(graph)


def _pin_inputs(graph: fx.Graph) -> None:
    """Refuse, by plain torch assertions, the inputs that the graph would take for those of its example.

    torch.export makes a constant of every input that is no tensor, and of a batch that the model counts, loops over or
    branches on. Its own guards are dropped: they refuse batches that work, and cannot be saved.
    """
    for node in list(graph.nodes):
        if node.op == "call_module" and node.target == "_guards_fn":
            graph.erase_node(node)
    placeholders = [node for node in graph.nodes if node.op == "placeholder" and "val" in node.meta]
    if not placeholders:
        return
    with graph.inserting_before(placeholders[-1].next):
        for node in placeholders:
            for test, operands, what in _bindings(graph, node, node.meta["val"]):
                kept = graph.call_function(test, operands)
                graph.call_function(torch._assert, (kept, f"the graph was exported for {what}, {NO_OTHER}"))


def _pin_aliases(graph: fx.Graph, leaves: list[object]) -> None:
    """Refuse two tensors where the example has one twice: forward may have seen that they are one (as attention does
    when query is key).
    """
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    first: dict[int, fx.Node] = {}
    with graph.inserting_before(placeholders[-1].next if placeholders else None):
        for node, leaf in zip(placeholders, leaves, strict=False):
            other = first.setdefault(id(leaf), node)
            if isinstance(leaf, Tensor) and other is not node:
                same = graph.call_function(operator.is_, (node, other))
                words = f"the graph was exported for {node.target} being {other.target}, {NO_OTHER}"
                graph.call_function(torch._assert, (same, words))


def _bindings(graph: fx.Graph, node: fx.Node, value: object) -> Iterator[tuple[Function, tuple[Argument, ...], str]]:
    if value is None:
        yield operator.is_, (node, None), f"{node.target}=None"
    elif isinstance(value, bool | int | float | str):
        yield operator.eq, (node, value), f"{node.target}={value!r}"
    elif isinstance(value, Tensor):
        for axis in range(value.ndim):
            low, high = _bounds(value.shape[axis])
            if low is None and high is None:
                continue
            size = graph.call_function(torch.ops.aten.sym_size.int, (node, axis))
            what = f"rows of {node.target}" if axis == 0 else f"numbers in dimension {axis} of {node.target}"
            if low == high:
                yield operator.eq, (size, low), f"{low} {what}"
                continue
            if low is not None:
                yield operator.ge, (size, low), f"{low} {what} or more"
            if high is not None:
                yield operator.le, (size, high), f"{high} {what} or fewer"


def _bounds(size: int | torch.SymInt) -> tuple[int | None, int | None]:
    """What torch.export found a size to be at least and at most; that an input's is 2 or more is its habit, not the
    model's.
    """
    if isinstance(size, int):
        return size, size
    environment = size.node.shape_env
    bounds = environment.bound_sympy(size.node.expr)
    low, high = (int(bound) if bound.is_Integer else None for bound in (bounds.lower, bounds.upper))
    habit = all(environment.var_to_range[symbol].lower <= 2 for symbol in size.node.expr.free_symbols)
    return None if habit and low != high else low, high


# Blocks in which forward switches gradients or autocast. They can be left to the model's own code; branches cannot.
_SWITCHES = (torch.ops.higher_order.wrap_with_set_grad_enabled, torch.ops.higher_order.wrap_with_autocast)


def shortcoming(net: Net, example_inputs: ExampleInputs) -> str:
    """What the graph leaves to be desired, in words: it keeps matrices in blocks that stay closed, or serves the
    example's batch size only. Empty if nothing.
    """
    batch = batch_size(double_batch_of_one(*split_inputs(example_inputs)))
    for node in (node for graph in net.graphs.values() for node in graph.nodes if node.op == "call_function"):
        if node.target in _SWITCHES:
            read = [operator.attrgetter(str(arg.target))(net) for arg in node.all_input_nodes if arg.op == "get_attr"]
            if any(isinstance(value, nn.Parameter) and value.ndim >= 2 for value in read):
                return f"leaves a block closed that holds matrices (`{node.target.name()}`)"
        elif node.target is operator.eq and _is_batch(node.args[0]) and node.args[1] == batch:
            return "serves no other batch size than the example's"
    return ""


def fixed_sizes(net: Net) -> str:
    """The sizes that the graph serves no other than, in words such as ``, fixed: x[1]=8``; empty if there are none."""
    fixed: dict[str, None] = {}
    for node in (node for graph in net.graphs.values() for node in graph.nodes):
        if node.target is operator.eq and _is_size(size := node.args[0]):
            (tensor,) = size.all_input_nodes
            fixed[f"{tensor.target}[{size.args[1]}]={node.args[1]}"] = None
    return f", fixed: {', '.join(fixed)}" if fixed else ""


def _is_batch(size: object) -> bool:
    """Whether the node is the first dimension of an input."""
    return _is_size(size) and bool(size.args[1] == 0)


def _is_size(size: object) -> TypeGuard[fx.Node]:
    """Whether the node is a dimension of an input."""
    if not isinstance(size, fx.Node) or size.target is not torch.ops.aten.sym_size.int:
        return False
    return isinstance(size.args[0], fx.Node) and size.args[0].op == "placeholder"


def alike(train: fx.Graph, other: fx.Graph, root: nn.Module) -> bool:
    """Whether two lifted graphs compute the same: their nodes, and the constants and bodies these read."""
    sources = [graph.python_code("self").src.replace("._train_", "._eval_") for graph in (train, other)]
    reads = [[node.target for node in graph.nodes if node.op == "get_attr"] for graph in (train, other)]
    return sources[0] == sources[1] and all(
        _equal(operator.attrgetter(a)(root), operator.attrgetter(b)(root))
        for a, b in zip(*reads, strict=True)
        if a != b
    )


def _equal(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    bodies = [part for part in (a, b) if isinstance(part, fx.GraphModule)]
    reads = any(node.op == "get_attr" for body in bodies for node in body.graph.nodes)
    return len(bodies) == 2 and not reads and bodies[0].code == bodies[1].code


def mode_of(graph: fx.Graph) -> bool | None:
    """The mode that operations of an exported graph are bound to; None where none depends on it."""
    bound = []
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload):
            names = [argument.name for argument in node.target._schema.arguments]
            given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
            bound += [given[name] for name in ("train", "training", "use_input_stats") if name in given]
    return any(bound) if bound else None
