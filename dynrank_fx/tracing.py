"""From what the user has (a module, a GraphModule, an ExportedProgram) to a Net; the caller's model stays untouched."""

from __future__ import annotations

import copy
import dataclasses
import enum
import linecache
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.utils import _pytree as pytree

from .errors import CaptureError
from .exported import alike, lift, mode_of, pin_inputs
from .inputs import double_batch_of_one, free_first_dimension, fresh, split_inputs
from .net import Net, copy_graph, copy_tree, unwrap
from .recognize import has_hooks
from .scopes import in_mode, same_randomness, slow_attention

_CLOSED = "stays closed to symbolic tracing."
_TORCH = str(Path(torch.__file__).parent)
_RESERVED = frozenset(dir(Net)) | {"meta", "graphs", "fixed_mode", "setting", "_codes", "_graph"}


class Capture(enum.Enum):
    """How a model becomes a graph."""

    SYMBOLIC = "torch.fx.symbolic_trace"
    EXPORT = "torch.export"


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
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise CaptureError(
            f"a {type(model).__name__} is no model that can be traced: give an nn.Module, a GraphModule or an "
            f"ExportedProgram"
        )
    if how is not None and not isinstance(how, Capture):
        raise CaptureError(f"{how!r} is no way to capture a model: give Capture.SYMBOLIC or Capture.EXPORT")
    model = unwrap(model)
    if isinstance(model, Net):
        return copy.deepcopy(model)
    if isinstance(model, fx.GraphModule):
        adopted = _adopted(model)
        _check_inputs(adopted, example_inputs)
        return adopted
    _refuse(model)
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
    if net is not None and doubt is None:
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
    mode = None
    if "train" in vars(model):  # torch.export puts functions that raise in place of train() and eval()
        pin_inputs(graph)
        mode = mode_of(graph)
    if mode is not None:
        root.train(mode)
    return _finish(root, graph, None, model, fixed_mode=mode is not None)


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
        for name, module in model.named_modules():
            net.get_submodule(name).training = module.training
    return net


def _surroundings() -> tuple[bool, ...]:
    autocast = (torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))
    return (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast)


class _Tracer(fx.Tracer):
    """Refuses what a graph of calls cannot hold: it would train where the model says ``no_grad``."""

    proxy_buffer_attributes = True  # otherwise what forward does to a buffer would be done once, while tracing

    def trace(self, root: Any, *args: Any, **kwargs: Any) -> fx.Graph:
        self.surroundings = _surroundings()
        graph = super().trace(root, *args, **kwargs)
        for name, buffer in root.named_buffers():
            if isinstance(buffer, fx.Proxy):
                raise RuntimeError(f"forward assigns the buffer {name}, which a symbolic graph cannot hold")
        return graph

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _surroundings() != self.surroundings:
            raise RuntimeError("gradients or autocast are switched inside forward, which a symbolic graph cannot hold")
        return super().create_node(*args, **kwargs)


def _symbolic(root: nn.Module, model: nn.Module) -> Net:
    graphs = {}
    if has_hooks(model):
        raise CaptureError(f"{type(model).__name__} has hooks of its own, which a symbolic graph would leave out.")
    for mode in (True, False):
        try:
            with in_mode(root, mode):
                graphs[mode] = _Tracer().trace(root)
            compile(graphs[mode].python_code("self").src, "graph", "exec")
        except Exception as error:
            where = origin(error, root)
            raise CaptureError(f"{where} cannot be traced symbolically: {_first_line(error)}.") from error
    same = graphs[True].python_code("self").src == graphs[False].python_code("self").src
    return _finish(root, graphs[True], None if same else graphs[False], model)


def _doubt(net: Net, model: nn.Module, example_inputs: Any) -> str | None:
    """Why a symbolic graph should not be relied on, or None. That of closed layers is the last: the graph is sound."""
    if example_inputs is None:
        return None
    with torch.no_grad(), slow_attention():
        twin, reference = copy.deepcopy(net).eval(), copy.deepcopy(model).eval()
        expected = _run(reference, example_inputs)
        try:
            got = _run(twin, example_inputs)
        except Exception as error:
            return f"its graph fails on the example inputs: {_first_line(error)}."
    if not _equal(expected, got):
        return "its graph computes something else on the example inputs."
    for node in net.graph.nodes:
        if node.op == "call_module" and _is_closed(net.get_submodule(str(node.target))):
            return f"{node.target} {_CLOSED}"
    return None


def _is_closed(module: nn.Module) -> bool:
    """A leaf of torch's own with matrices inside submodules or under other names than ``weight``, that export opens."""
    if isinstance(module, nn.RNNBase | nn.RNNCellBase) or hasattr(module, "parametrizations"):
        return False
    return any(p.ndim >= 2 and name != "weight" for name, p in module.named_parameters())


def _equal(a: Any, b: Any) -> bool:
    leaves_a, leaves_b = pytree.tree_leaves(a), pytree.tree_leaves(b)
    return len(leaves_a) == len(leaves_b) and all(map(_same_leaf, leaves_a, leaves_b))


def _same_leaf(x: Any, y: Any) -> bool:
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        return x.shape == y.shape and bool(((x == y) | (x.isnan() & y.isnan())).all())
    if dataclasses.is_dataclass(x) and type(x) is type(y):
        return _equal(vars(x), vars(y))
    return bool(x == y)


# torch.export


def _exported(root: nn.Module, model: nn.Module, example_inputs: Any, dynamic_shapes: Any) -> Net:
    if example_inputs is None:
        raise CaptureError(f"torch.export needs example inputs to trace {type(model).__name__}; pass example_inputs")
    args, kwargs = double_batch_of_one(*split_inputs(fresh(example_inputs)))
    free = free_first_dimension(args, kwargs) if dynamic_shapes is None else dynamic_shapes
    graphs: dict[bool, fx.Graph] = {}
    for mode in (True, False):
        try:
            with slow_attention(), in_mode(root, mode):
                program = torch.export.export(root, args, kwargs, dynamic_shapes=free)
            module = program.module(check_guards=False)
        except Exception as error:
            raise CaptureError(f"{origin(error, root)} cannot be exported: {_first_line(error)}.") from error
        graphs[mode] = lift(module, root, prefix="train" if mode else "eval")
    same = alike(graphs[True], graphs[False], root)
    return _finish(root, graphs[True], None if same else graphs[False], model)


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


def _refuse(model: nn.Module) -> None:
    """What is wrong with a model whatever way it is traced."""
    tensors = [name for name, value in vars(model).items() if isinstance(value, Tensor)]
    for name in (*model._modules, *model._parameters, *model._buffers, *tensors):
        if name in _RESERVED:
            raise CaptureError(
                f"the model calls a part of it {name!r}, which a graph module needs for itself: rename it"
            )
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
