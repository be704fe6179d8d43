"""What a weight is for in its network: the stem, a shortcut, or the classifier, as far as the graphs tell.

These are left dense in the paper's experiments (arXiv 2508.08625) and elsewhere (arXiv 2103.03936, arXiv 2305.02538):
they hold little of the cost, and the accuracy depends on them.
"""

from __future__ import annotations

import enum
import operator
from collections.abc import Iterable, Mapping

import torch
from torch import fx

from ..ops import ConvOp, EmbeddingOp, LinearOp
from .locate import Located, NodeUse


class Role(enum.Enum):
    """What a weight is for in its network, where that is a reason to leave it dense. The value is how a plan says it.

    Attributes:
        STEM: The first layer: a convolution or an embedding of the model's input.
        SHORTCUT: A 1×1 convolution on a path beside other layers, to whose output it is added.
        HEAD: The classifier: the linear layer that gives the model's output.
    """

    STEM = "the stem: it reads the model's input"
    SHORTCUT = "a shortcut: a 1×1 convolution beside other layers"
    HEAD = "the classifier: it gives the model's output"


def roles_of(located: Mapping[str, Located]) -> dict[str, Role]:
    """The role of every weight that has one.

    A stem is a convolution or an embedding of the input, with no other weight before it; a shortcut a 1×1 convolution
    that is added to what other weights make of the same input; the classifier a linear whose output, reshaped or
    normalised at most, is the model's.
    """
    weighted = {use.node for matrix in located.values() for use in matrix.uses if use.node is not None}
    graphs = {use.graph for matrix in located.values() for use in matrix.uses if use.graph is not None}
    below = {node for graph in graphs for node in _below(graph, weighted)}
    roles = {}
    for name, matrix in located.items():
        pointwise = matrix.parameter.ndim > 2 and all(size == 1 for size in matrix.parameter.shape[2:])
        role = _common([_role(use, pointwise, weighted, below) for use in matrix.uses])
        if role is not None:
            roles[name] = role
    return roles


def _below(graph: fx.Graph, weighted: set[fx.Node]) -> set[fx.Node]:
    """The nodes that depend on what a weight made."""
    below: set[fx.Node] = set()
    for node in graph.nodes:
        if node in weighted or any(before in below for before in node.all_input_nodes):
            below.add(node)
    return below


def _common(roles: Iterable[Role | None]) -> Role | None:
    """The role of every use, where they agree: a tied embedding is no stem."""
    each = set(roles)
    return each.pop() if len(each) == 1 else None


def _role(use: NodeUse, pointwise: bool, weighted: set[fx.Node], below: set[fx.Node]) -> Role | None:
    node, x = use.node, use.x
    if node is None or x is None:
        return None
    if isinstance(use.op, ConvOp | EmbeddingOp) and x not in below:
        return Role.STEM
    if isinstance(use.op, ConvOp) and pointwise and len(x.users) > 1 and _is_shortcut(node, x, weighted, below):
        return Role.SHORTCUT
    if isinstance(use.op, LinearOp) and _follow(node, weighted).op == "output":
        return Role.HEAD
    return None


def _is_shortcut(node: fx.Node, x: fx.Node, weighted: set[fx.Node], below: set[fx.Node]) -> bool:
    """Whether what becomes of the node is added to what other weights make of x."""
    end = _follow(node, weighted)
    if end.target not in _ADDS:
        return False
    between = _descendants(x, end)
    others = [operand for operand in end.all_input_nodes if operand is not node and node not in _chain(operand)]
    return any(other in between and other in below and other is not x for other in others)


_ADDS = (operator.add, operator.iadd, torch.add, "add", "add_", torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)


def _follow(node: fx.Node, weighted: set[fx.Node]) -> fx.Node:
    """The node where the way from this one branches, joins another, or meets the next weight."""
    while len(node.users) == 1:
        (user,) = node.users
        if user.op == "output" or user in weighted or len([n for n in user.all_input_nodes if n.op != "get_attr"]) > 1:
            return user
        node = user
    return node


def _chain(node: fx.Node) -> set[fx.Node]:
    """The node and those before it that lead only here."""
    chain = {node}
    while len(inputs := [n for n in node.all_input_nodes if n.op != "get_attr"]) == 1 and len(inputs[0].users) == 1:
        node = inputs[0]
        chain.add(node)
    return chain


def _descendants(node: fx.Node, until: fx.Node) -> set[fx.Node]:
    """What depends on the node, up to another one that comes after it in the graph."""
    dependent, each = {node}, node
    while each is not until:
        each = each.next
        if any(before in dependent for before in each.all_input_nodes):
            dependent.add(each)
    return dependent
