"""Graphs that torch.export made: over the original module tree, and true to the inputs they were made for."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn


def lift(module: fx.GraphModule, root: nn.Module, prefix: str) -> fx.Graph:
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
    pin_inputs(graph)
    return graph


def pin_inputs(graph: fx.Graph) -> None:
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


def alike(train: fx.Graph, other: fx.Graph, root: nn.Module) -> bool:
    """Whether two lifted graphs compute the same: their nodes, and the constants and bodies these read."""
    sources = [graph.python_code("self").src.replace("._train_", "._eval_") for graph in (train, other)]
    reads = [[node.target for node in graph.nodes if node.op == "get_attr"] for graph in (train, other)]
    return sources[0] == sources[1] and all(
        _equal(operator.attrgetter(a)(root), operator.attrgetter(b)(root))
        for a, b in zip(*reads, strict=True)
        if a != b
    )


def _equal(a: Any, b: Any) -> bool:
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
