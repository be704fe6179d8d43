"""Graphs as plain values, to be pickled: torch writes a graph's code and traces it again, which reads a site's weight
once and for all.
"""

from __future__ import annotations

import builtins
import importlib
import pickle
import warnings
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import fx
from torch.fx.node import Argument, Target, _get_qualified_name, map_aggregate

from ..aliases import Function

GraphData: TypeAlias = tuple[list[tuple[Any, ...]], bytes]
"""A row (op, name, target, args, kwargs) for each node, in order, and what makes the code around them,
pickled."""


@dataclass(frozen=True)
class _Ref:
    """A node, by its name."""

    name: str


@dataclass(frozen=True)
class _Named:
    """A function, by its name: those of torch's own modules in C cannot be pickled as objects."""

    name: str


def graph_to_data(graph: fx.Graph) -> GraphData:
    """The nodes as values, without their ``meta``."""

    def plain(value: Argument) -> Argument:
        return _Ref(value.name) if isinstance(value, fx.Node) else value  # type: ignore[return-value]

    rows = [
        (node.op, node.name, _named(node.target), map_aggregate(node.args, plain), map_aggregate(node.kwargs, plain))
        for node in graph.nodes
    ]
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # torch about its own TreeSpec
        return rows, pickle.dumps(graph._codegen)


def graph_from_data(data: GraphData) -> fx.Graph:
    """The inverse of ``graph_to_data``."""
    rows, codegen = data
    graph, nodes = fx.Graph(tracer_cls=fx.Tracer), dict[str, fx.Node]()

    def real(value: Argument) -> Argument:
        return nodes[value.name] if isinstance(value, _Ref) else value

    for op, name, target, args, kwargs in rows:
        function = _function(target.name) if isinstance(target, _Named) else target
        given = map_aggregate(args, real), map_aggregate(kwargs, real)
        nodes[name] = graph.create_node(op, function, *given, name=name)
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        graph._codegen = pickle.loads(codegen)
    return graph


def _named(target: Target) -> Target | _Named:
    """The name of a function, where it leads back to it."""
    if isinstance(target, str):
        return target
    try:
        name = _get_qualified_name(target)
        return _Named(name) if _function(name) is target else target
    except (AttributeError, ImportError, RuntimeError):
        return target


def _function(name: str) -> Function:
    """What a dotted name stands for."""
    first, *path = name.split(".")
    value = importlib.import_module(first) if path else builtins
    for index, part in enumerate(path or [first]):
        if not hasattr(value, part):
            importlib.import_module(".".join((first, *path[: index + 1])))
        value = getattr(value, part)
    return value  # type: ignore[return-value]
