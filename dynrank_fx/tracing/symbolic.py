"""Capture by torch.fx's symbolic tracing: the model's own code, run on proxies in both modes."""

from __future__ import annotations

import inspect
import operator
from types import FunctionType
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import Argument

from ..aliases import Function, Kwargs
from ..errors import CaptureError, first_line
from ..ops import has_hooks
from .blame import origin
from .inputs import NO_OTHER, ExampleInputs, split_inputs
from .isolation import in_mode, same_values
from .net import Net, finished

_UNREADABLE = "its forward has arguments that torch.fx cannot read (it is wrapped by a decorator)"


def _surroundings() -> tuple[bool, ...]:
    autocast = (torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))
    return (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast)


class _Tracer(fx.Tracer):
    """Refuses what a graph of calls cannot hold: it would train where the model says ``no_grad``."""

    proxy_buffer_attributes = True  # otherwise what forward does to a buffer would be done once, while tracing

    def trace(self, root: nn.Module | Function, concrete_args: Kwargs | None = None) -> fx.Graph:
        self.surroundings = _surroundings()
        graph = super().trace(root, concrete_args)
        for name, buffer in self.root.named_buffers():
            if isinstance(buffer, fx.Proxy):
                raise RuntimeError(f"forward assigns the buffer {name}, which a symbolic graph cannot hold")
        return graph

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:  # Any: they are handed on as they are
        if _surroundings() != self.surroundings:
            raise RuntimeError("gradients or autocast are switched inside forward, which a symbolic graph cannot hold")
        return super().create_node(*args, **kwargs)


def trace_symbolically(root: nn.Module, model: nn.Module, example_inputs: ExampleInputs | None) -> Net:
    """The Net over ``root``, a copy of ``model``. Raises CaptureError naming the line that cannot be traced."""
    graphs = {}
    if has_hooks(model):
        raise CaptureError(f"{type(model).__name__} has hooks of its own, which a symbolic graph would leave out.")
    for mode in (True, False):
        try:
            with same_values(root), in_mode(root, mode):
                graphs[mode] = _Tracer().trace(root)
            compile(graphs[mode].python_code("self").src, "graph", "exec")
        except Exception as error:  # whatever the model's own forward raises on proxies
            where = origin(error, root)
            why = _UNREADABLE if "co_varnames is too small" in str(error) else first_line(error)
            raise CaptureError(f"{where} cannot be traced symbolically: {why}.") from error
    given = _given(model, example_inputs)
    for mode, graph in graphs.items():
        _refuse_caught(root, graph)
        _pin_optional(root, graph, mode, given)
    same = graphs[True].python_code("self").src == graphs[False].python_code("self").src
    return finished(root, graphs[True], None if same else graphs[False], model)


def _refuse_caught(root: nn.Module, graph: fx.Graph) -> None:
    """Raises CaptureError where forward reads arguments that it has no name for: neither the interpreter of torch.fx
    nor torch.export hands them to a symbolic graph.
    """
    for node in graph.nodes:
        if node.op == "placeholder" and str(node.target).startswith("*") and node.users:
            raise CaptureError(
                f"forward of {type(root).__name__} reads {node.target}, which a symbolic graph cannot be given."
            )


def _given(model: nn.Module, example_inputs: ExampleInputs | None) -> set[str]:
    """The names of the arguments of forward for which the example has a value."""
    if example_inputs is None:
        return set()
    args, kwargs = split_inputs(example_inputs)
    bound = inspect.signature(model.forward).bind(*args, **kwargs)
    return {name for name, value in bound.arguments.items() if value is not None}


def _pin_optional(root: nn.Module, graph: fx.Graph, mode: bool, given: set[str]) -> None:
    """Refuse, by plain assertions, the optional inputs for which forward would do something else.

    ``x is None`` is false of a proxy, and so is ``torch.is_tensor(x)``: an input that forward tests must be there, and
    one that the graph does not use must not, unless the example shows that it makes no difference.
    """
    optional = [node for node in graph.nodes if node.op == "placeholder" and node.args == (None,)]
    tested = [node for node in optional if _is_tested(root, graph, node, mode)]
    unused = [node for node in optional if not node.users and node not in tested and node.target not in given]
    with graph.inserting_before(next((node for node in graph.nodes if node.op != "placeholder"), None)):
        for nodes, test, words in ((tested, operator.is_not, "with"), (unused, operator.is_, "without")):
            for node in nodes:
                kept = graph.call_function(test, (node, None))
                text = f"the graph was traced {words} {node.target}, {NO_OTHER}"
                graph.call_function(torch._assert, (kept, text))


def _is_tested(root: nn.Module, graph: fx.Graph, optional: fx.Node, mode: bool) -> bool:
    """Whether forward without this input is more than the same calls, given None."""
    with same_values(root), in_mode(root, mode):
        try:
            without = _Tracer().trace(root, concrete_args={str(optional.target): None})
        except Exception:  # forward cannot do without it, which it may say by any exception
            return True
    return _calls(graph, str(optional.target)) != _calls(without, str(optional.target))


def _calls(graph: fx.Graph, optional: str) -> list[tuple[object, ...]]:
    """What is called with what, in order, None standing for the optional input."""
    shown: dict[fx.Node, Argument] = {}
    calls: list[tuple[object, ...]] = []
    for node in graph.nodes:
        if node.op == "placeholder":
            shown[node] = None if node.target == optional else ("input", str(node.target))
        elif getattr(node.target, "__name__", "") != "_assert_is_none":
            shown[node] = ("call", len(calls))
            calls.append((node.op, node.target, fx.node.map_arg((node.args, node.kwargs), shown.get)))
    return calls


def closed_layers(net: Net) -> list[str]:
    """The layers that symbolic tracing left whole although they hold matrices that torch.export can open."""
    called = dict.fromkeys(str(n.target) for g in net.graphs.values() for n in g.nodes if n.op == "call_module")
    return [name for name in called if _is_closed(net.get_submodule(name))]


def closed_functions(net: Net) -> list[str]:
    """The functions that torch.fx was told not to trace although they are given a matrix of the model's."""
    matrices = {name for name, p in net.named_parameters(remove_duplicate=False) if p.ndim >= 2}
    closed = []
    for node in (node for graph in net.graphs.values() for node in graph.nodes if node.op == "call_function"):
        given = any(each.op == "get_attr" and each.target in matrices for each in node.all_input_nodes)
        if given and isinstance(node.target, FunctionType) and not node.target.__module__.startswith("torch."):
            closed.append(node.target.__name__)
    return closed


def _is_closed(module: nn.Module) -> bool:
    """A leaf of torch's own with matrices inside submodules or under other names than ``weight``."""
    if isinstance(module, nn.RNNBase | nn.RNNCellBase | Net) or hasattr(module, "parametrizations"):
        return False
    return any(p.ndim >= 2 and name != "weight" for name, p in module.named_parameters())
