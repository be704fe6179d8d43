"""From what the user has (a module, a GraphModule, an ExportedProgram) to a Net; the caller's model stays untouched."""

from __future__ import annotations

import copy
import enum
import linecache
import operator
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.utils import _pytree as pytree

from .errors import CaptureError
from .inputs import double_batch_of_one, free_first_dimension, fresh, split_inputs
from .net import Net, copy_graph, copy_tree
from .randomness import random_state, set_random_state

_CLOSED = "stays closed to symbolic tracing."
_TORCH = str(Path(torch.__file__).parent)


class Capture(enum.Enum):
    """How a model becomes a graph."""

    SYMBOLIC = "torch.fx.symbolic_trace"
    EXPORT = "torch.export"


@contextmanager
def same_randomness() -> Iterator[None]:
    """What is drawn inside is drawn again afterwards."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)


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


def capture(
    model: nn.Module | torch.export.ExportedProgram,
    example_inputs: Any = None,
    *,
    dynamic_shapes: Any = None,
    how: Capture | None = None,
) -> Net:
    """A trainable Net that computes what ``model`` computes, over a copy of its parameters.

    example_inputs: a tuple of positional arguments, a dict of keyword arguments, or ``(args, kwargs)``. Needed for
    torch.export, and to check the graph against the model; a GraphModule needs none. dynamic_shapes: as in
    torch.export; by default the first dimension of every tensor is free. how: by default symbolic tracing where it
    works, opens every layer with weights, and reproduces the model on the example; torch.export otherwise.

    Raises CaptureError naming the module and the line that cannot be traced, or what the example inputs do not fit.
    """
    if isinstance(model, torch.export.ExportedProgram):
        model = model.module(check_guards=False)
    if isinstance(model, Net):
        return copy.deepcopy(model)
    if isinstance(model, fx.GraphModule):
        adopted = _adopted(model)
        _check_inputs(adopted, example_inputs)
        return adopted
    _refuse_lazy(model)
    twin = _copy(model)
    _check_inputs(twin, example_inputs)
    if how is Capture.SYMBOLIC:
        return _symbolic(twin, model)
    if how is Capture.EXPORT:
        return _exported(twin, model, example_inputs, dynamic_shapes)
    net: Net | None = None
    try:
        net = _symbolic(twin, model)
        doubt = _doubt(net, twin, example_inputs)
    except CaptureError as error:
        doubt = str(error)
        if example_inputs is None:
            raise
    if net is not None and (doubt is None or example_inputs is None):
        return net
    try:
        return _exported(_copy(model), model, example_inputs, dynamic_shapes)
    except CaptureError as error:
        if net is not None and doubt is not None and doubt.endswith(_CLOSED):
            return net  # faithful, with closed layers: those are listed as skipped
        raise CaptureError(f"{error} Symbolic tracing before it: {doubt}") from error


def _adopted(model: fx.GraphModule) -> Net:
    """The caller's own graph as a Net. One that torch.export made in one mode stays in it."""
    root = copy_tree(model)
    for node in model.graph.nodes:
        if node.op == "get_attr" and node.target in vars(model):
            vars(root)[node.target] = copy.deepcopy(vars(model)[node.target])
    graph = copy_graph(model.graph)
    exported = "train" in vars(model)  # torch.export puts functions that raise in place of train() and eval()
    if exported:
        _pin_inputs(graph)
    fixed = exported and _depends_on_mode(graph)
    return _finish(root, graph, None, model, fixed_mode=fixed)


def _copy(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} cannot be copied ({error}); the pass works on a copy, so make the model "
            f"support copy.deepcopy"
        ) from error


def _finish(
    root: nn.Module, train: fx.Graph, other: fx.Graph | None, model: nn.Module, *, fixed_mode: bool = False
) -> Net:
    for graph in (train, other or train):
        graph._tracer_cls = fx.Tracer  # it is called when a saved module is loaded: not by our class, or export's own
    net = Net(root, train, other, fixed_mode=fixed_mode)
    type(net).__name__ = type(model).__name__
    if not fixed_mode:
        net.train(model.training)
        _set_modes(net, {name: module.training for name, module in model.named_modules()})
    return net


def _set_modes(root: nn.Module, modes: dict[str, bool]) -> None:
    for name, module in root.named_modules():
        module.training = modes.get(name, module.training)


# Symbolic tracing


def _surroundings() -> tuple[bool, ...]:
    autocast = (torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))
    return (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast)


class _Tracer(fx.Tracer):
    """Refuses what a graph of calls cannot hold: it would train where the model says ``no_grad``."""

    def trace(self, *args: Any, **kwargs: Any) -> fx.Graph:
        self.surroundings = _surroundings()
        return super().trace(*args, **kwargs)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _surroundings() != self.surroundings:
            raise RuntimeError("gradients or autocast are switched inside forward, which a symbolic graph cannot hold")
        return super().create_node(*args, **kwargs)


def _symbolic(root: nn.Module, model: nn.Module) -> Net:
    graphs = {}
    modes = {name: module.training for name, module in root.named_modules()}
    for mode in (True, False):
        root.train(mode)
        try:
            graphs[mode] = _Tracer().trace(root)
        except Exception as error:
            where = origin(error, root)
            raise CaptureError(f"{where} cannot be traced symbolically: {_first_line(error)}.") from error
        finally:
            _set_modes(root, modes)
    same = graphs[True].python_code("self").src == graphs[False].python_code("self").src
    return _finish(root, graphs[True], None if same else graphs[False], model)


def _doubt(net: Net, model: nn.Module, example_inputs: Any) -> str | None:
    """Why a symbolic graph should not be relied on, or None."""
    for node in net.graph.nodes:
        if node.op == "call_module" and _is_closed(net.get_submodule(str(node.target))):
            return f"{node.target} {_CLOSED}"
    if example_inputs is None:
        return None
    with torch.no_grad(), slow_attention():
        twin, reference = copy.deepcopy(net).eval(), copy.deepcopy(model).eval()
        expected = _run(reference, example_inputs)
        try:
            got = _run(twin, example_inputs)
        except Exception as error:
            return f"its graph fails on the example inputs: {_first_line(error)}."
    return None if _equal(expected, got) else "its graph computes something else on the example inputs."


def _is_closed(module: nn.Module) -> bool:
    """A leaf of torch's own with matrices inside submodules or under other names than ``weight``, that export opens."""
    if isinstance(module, nn.RNNBase | nn.RNNCellBase) or hasattr(module, "parametrizations"):
        return False
    return any(p.ndim >= 2 and name != "weight" for name, p in module.named_parameters())


def _equal(a: Any, b: Any) -> bool:
    leaves_a = pytree.tree_leaves(a)
    leaves_b = pytree.tree_leaves(b)
    if len(leaves_a) != len(leaves_b):
        return False
    return all(
        torch.equal(x.nan_to_num(), y.nan_to_num()) if isinstance(x, Tensor) and isinstance(y, Tensor) else x == y
        for x, y in zip(leaves_a, leaves_b, strict=True)
    )


# torch.export


def _exported(root: nn.Module, model: nn.Module, example_inputs: Any, dynamic_shapes: Any) -> Net:
    if example_inputs is None:
        raise CaptureError(f"torch.export needs example inputs to trace {type(model).__name__}; pass example_inputs")
    args, kwargs = double_batch_of_one(*split_inputs(fresh(example_inputs)))
    free = free_first_dimension(args, kwargs) if dynamic_shapes is None else dynamic_shapes
    graphs: dict[bool, fx.Graph] = {}
    modes = {name: module.training for name, module in root.named_modules()}
    for mode in (True, False):
        root.train(mode)
        if mode == model.training:
            _set_modes(root, modes)  # as it stands: parts may have been set apart, such as a frozen batch norm
        buffers = {name: buffer.clone() for name, buffer in root.named_buffers()}
        try:
            with slow_attention(), same_randomness():
                program = torch.export.export(root, args, kwargs, dynamic_shapes=free)
            module = program.module(check_guards=False)
        except Exception as error:
            raise CaptureError(f"{origin(error, root)} cannot be exported: {_first_line(error)}.") from error
        finally:
            for name, buffer in root.named_buffers():
                buffer.copy_(buffers[name])
            _set_modes(root, modes)
        graphs[mode] = _lift(module, root, prefix="train" if mode else "eval")
    same = _text(graphs[True]) == _text(graphs[False])
    return _finish(root, graphs[True], None if same else graphs[False], model)


def _lift(module: fx.GraphModule, root: nn.Module, prefix: str) -> fx.Graph:
    """The exported graph over the original tree: constants that export lifted come along under names of their own."""
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
            else:
                setattr(root, name, value)  # the body of a control-flow operator
            node.target = name
        elif node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    _pin_inputs(graph)
    return graph


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
                graph.call_function(torch._assert, (kept, f"the graph was exported for {what}, and serves no other"))


def _bindings(graph: fx.Graph, node: fx.Node, value: Any) -> Iterator[tuple[Any, tuple[Any, ...], str]]:
    if value is None:
        yield operator.is_, (node, None), f"{node.target}=None"
    elif isinstance(value, bool | int | float | str):
        yield operator.eq, (node, value), f"{node.target}={value!r}"
    elif isinstance(value, Tensor) and value.ndim:
        low, high = _bounds(value.shape[0])
        if low is None and high is None:
            return
        size = graph.call_function(torch.ops.aten.sym_size.int, (node, 0))
        if low == high:
            yield operator.eq, (size, low), f"{low} rows of {node.target}"
            return
        if low is not None:
            yield operator.ge, (size, low), f"{low} rows of {node.target} or more"
        if high is not None:
            yield operator.le, (size, high), f"{high} rows of {node.target} or fewer"


def _bounds(size: int | torch.SymInt) -> tuple[int | None, int | None]:
    """What torch.export found a size to be at least and at most; that it is 2 or more is its habit, not the model's."""
    if isinstance(size, int):
        return size, size
    found = size.node.shape_env.bound_sympy(size.node.expr)
    low, high = (int(bound) if bound.is_Integer else None for bound in (found.lower, found.upper))
    return None if low is not None and low <= 2 and low != high else low, high


def _text(graph: fx.Graph) -> str:
    return graph.python_code("self").src.replace("._train_", "._eval_")


_MODE_OPS = ("dropout", "batch_norm", "instance_norm", "rrelu", "lstm", "gru", "rnn_tanh", "rnn_relu")


def _depends_on_mode(graph: fx.Graph) -> bool:
    return any(node.op == "call_function" and any(op in str(node.target) for op in _MODE_OPS) for node in graph.nodes)


# Messages


def _check_inputs(model: nn.Module, example_inputs: Any) -> None:
    """Run the copy once in eval mode: what does not fit should be said in the model's own terms."""
    if example_inputs is None:
        return
    twin = copy.deepcopy(model)
    if not getattr(twin, "fixed_mode", False):
        twin.eval()
    try:
        with torch.no_grad():
            _run(twin, example_inputs)
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} does not accept the example inputs ({_describe(*split_inputs(example_inputs))}): "
            f"{_first_line(error)}."
        ) from error


def _run(model: nn.Module, example_inputs: Any) -> Any:
    """The output, with inputs and random generators left as they are."""
    args, kwargs = split_inputs(fresh(example_inputs))
    with same_randomness():
        return model(*args, **kwargs)


def _refuse_lazy(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():  # type: ignore[misc]
            raise CaptureError(
                f"{name or 'the model'} ({type(module).__name__}) has no weights yet: call the model once, on the "
                f"example inputs, before it is transformed"
            )


def _describe(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    def one(value: Any) -> str:
        return (
            f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
            if isinstance(value, Tensor)
            else type(value).__name__
        )

    return ", ".join([*(one(a) for a in args), *(f"{k}={one(v)}" for k, v in kwargs.items())])


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__


def origin(error: BaseException, root: nn.Module) -> str:
    """The module and line of the innermost frame of the user's own code."""
    place = type(root).__name__
    names = {id(module): name for name, module in root.named_modules()}
    for frame, number in traceback.walk_tb(error.__traceback__):
        file = frame.f_code.co_filename
        owner = frame.f_locals.get("self")
        if file.startswith((_TORCH, str(Path(__file__).parent))) or file.startswith("<") or id(owner) not in names:
            continue
        name = names[id(owner)]
        line = linecache.getline(file, number).strip()
        place = f"{name or 'the model'} ({type(owner).__name__}, {Path(file).name}:{number}: `{line}`)"
    return place
