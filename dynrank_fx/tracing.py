"""From what the user has (a module, a GraphModule, an ExportedProgram) to a Net; the caller's model stays untouched."""

from __future__ import annotations

import copy
import enum
import linecache
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from .errors import CaptureError
from .inputs import double_batch_of_one, free_first_dimension, split_inputs
from .net import Net, copy_graph, copy_tree

_CLOSED = "stays closed to symbolic tracing."
_TORCH = str(Path(torch.__file__).parent)


class Capture(enum.Enum):
    """How a model becomes a graph."""

    SYMBOLIC = "torch.fx.symbolic_trace"
    EXPORT = "torch.export"


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
        model = model.module()
    if isinstance(model, Net):
        return copy.deepcopy(model)
    if isinstance(model, fx.GraphModule):
        adopted = _adopted(model)
        _check_inputs(adopted, example_inputs)
        return adopted
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
    exported = "train" in vars(model)  # torch.export puts functions that raise in place of train() and eval()
    fixed = exported and _depends_on_mode(model.graph)
    return _finish(root, copy_graph(model.graph), None, model, fixed_mode=fixed)


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
    net = Net(root, train, other, fixed_mode=fixed_mode)
    type(net).__name__ = type(model).__name__
    if not fixed_mode:
        net.train(model.training)
        for (_, twin), (_, original) in zip(root.named_modules(), model.named_modules(), strict=False):
            twin.training = original.training  # parts may have been set apart, such as a frozen batch norm
    return net


# Symbolic tracing


def _symbolic(root: nn.Module, model: nn.Module) -> Net:
    graphs = {}
    modes = {name: module.training for name, module in root.named_modules()}
    for mode in (True, False):
        tracer = fx.Tracer()
        root.train(mode)
        try:
            graphs[mode] = tracer.trace(root)
        except Exception as error:
            where = origin(error, root)
            raise CaptureError(f"{where} cannot be traced symbolically: {_first_line(error)}.") from error
        finally:
            for name, module in root.named_modules():
                module.training = modes[name]
    same = graphs[True].python_code("self").src == graphs[False].python_code("self").src
    return _finish(root, graphs[True], None if same else graphs[False], model)


def _doubt(net: Net, model: nn.Module, example_inputs: Any) -> str | None:
    """Why a symbolic graph should not be relied on, or None."""
    for node in net.graph.nodes:
        if node.op == "call_module" and _is_closed(net.get_submodule(str(node.target))):
            return f"{node.target} {_CLOSED}"
    if example_inputs is None:
        return None
    args, kwargs = split_inputs(example_inputs)
    with torch.no_grad(), slow_attention():
        twin, reference = copy.deepcopy(net).eval(), copy.deepcopy(model).eval()
        torch_state = torch.get_rng_state()
        expected = reference(*args, **kwargs)
        torch.set_rng_state(torch_state)
        try:
            got = twin(*args, **kwargs)
        except Exception as error:
            return f"its graph fails on the example inputs: {_first_line(error)}."
        torch.set_rng_state(torch_state)
    return None if _equal(expected, got) else "its graph computes something else on the example inputs."


def _is_closed(module: nn.Module) -> bool:
    """A leaf of torch's own with matrices inside submodules or under other names than ``weight``."""
    return any(p.ndim >= 2 and name != "weight" for name, p in module.named_parameters()) and not isinstance(
        module, nn.Embedding | nn.EmbeddingBag
    )


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
    args, kwargs = double_batch_of_one(*split_inputs(example_inputs))
    free = free_first_dimension(args, kwargs) if dynamic_shapes is None else dynamic_shapes
    graphs: dict[bool, fx.Graph] = {}
    modes = {name: module.training for name, module in root.named_modules()}
    for mode in (True, False):
        root.train(mode)
        buffers = {name: buffer.clone() for name, buffer in root.named_buffers()}
        try:
            with slow_attention():
                program = torch.export.export(root, args, kwargs, dynamic_shapes=free)
            module = program.module(check_guards=False)
        except Exception as error:
            raise CaptureError(f"{origin(error, root)} cannot be exported: {_first_line(error)}.") from error
        finally:
            for name, buffer in root.named_buffers():
                buffer.copy_(buffers[name])
            for name, submodule in root.named_modules():
                submodule.training = modes.get(name, submodule.training)
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
    return graph


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
    args, kwargs = split_inputs(example_inputs)
    twin = copy.deepcopy(model)
    if not getattr(twin, "fixed_mode", False):
        twin.eval()
    state = torch.get_rng_state()
    try:
        with torch.no_grad():
            twin(*args, **kwargs)
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} does not accept the example inputs ({_describe(args, kwargs)}): "
            f"{_first_line(error)}."
        ) from error
    finally:
        torch.set_rng_state(state)


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
