"""Finding sites: every matrix of the model is a site, or skipped with the reason as a sentence.

One finder for both kinds of graph: a call of an ``nn.Linear`` / ``nn.Conv*d`` module, and a functional or aten call
on a parameter, are the same Use.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from .net import Net
from .ops import Op, Shape, op_from_json, op_to_json
from .recognize import Call, function_op, has_hooks, holds_more, module_op, operand


@dataclass(frozen=True)
class Use:
    """One application of the weight: the op, and the shape of its input on the example (None where unknown)."""

    op: Op
    input_shape: Shape | None = None


@dataclass(frozen=True)
class Site:
    """One weight that could be factored, and every use of it. Names only: no node and no parameter.

    name: the first qualified name of the weight in the original model; aliases: its other names.
    """

    name: str
    shape: Shape
    uses: tuple[Use, ...]
    aliases: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        return self.uses[0].op.kind

    @property
    def groups(self) -> int:
        return self.uses[0].op.groups

    @property
    def params(self) -> int:
        return math.prod(self.shape)

    @property
    def flops(self) -> int | None:
        """FLOPs of all uses on the example inputs, or None where no example was given."""
        if any(use.input_shape is None for use in self.uses):
            return None
        return sum(use.op.flops(use.input_shape, self.shape) for use in self.uses if use.input_shape is not None)

    def left_dense(self, reason: str) -> Skipped:
        """The same weight, not factored after all."""
        return Skipped(self.name, self.shape, reason, self.aliases)

    def to_json(self) -> dict[str, Any]:
        uses = [{**op_to_json(use.op), "input_shape": use.input_shape} for use in self.uses]
        return {"name": self.name, "aliases": self.aliases, "shape": self.shape, "uses": uses}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Site:
        uses = []
        for use in data["uses"]:
            shape = use["input_shape"]
            op = op_from_json({k: v for k, v in use.items() if k != "input_shape"})
            uses.append(Use(op, None if shape is None else _shape(shape)))
        return cls(_text(data["name"]), _shape(data["shape"]), tuple(uses), tuple(map(_text, data["aliases"])))


@dataclass(frozen=True)
class Skipped:
    """A matrix that stays dense, and why."""

    name: str
    shape: Shape
    reason: str
    aliases: tuple[str, ...] = ()

    @property
    def params(self) -> int:
        return math.prod(self.shape)

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "aliases": self.aliases, "shape": self.shape, "reason": self.reason}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Skipped:
        aliases = tuple(map(_text, data["aliases"]))
        return cls(_text(data["name"]), _shape(data["shape"]), _text(data["reason"]), aliases)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _shape(values: Any) -> Shape:
    return tuple(map(operator.index, values))


@dataclass(frozen=True)
class NodeUse:
    """A Use at its node. own_bias: the module's own bias serves; otherwise ``bias``.

    The operands are read from the node when asked for: rewriting another site may have replaced them.
    """

    graph: fx.Graph
    node: fx.Node
    op: Op
    holder: str
    own_bias: bool

    @property
    def x(self) -> fx.Node:
        """The input."""
        x = operand(self.node, 0, "input")
        assert isinstance(x, fx.Node)
        return x

    @property
    def bias(self) -> Any:
        """The bias that is given in the call: a node, or None for none."""
        return operand(self.node, 2, "bias")


@dataclass
class Located:
    """A matrix parameter in the graphs: who holds it, who applies it, and who else touches it."""

    parameter: nn.Parameter
    names: list[str]
    uses: list[NodeUse] = field(default_factory=list)
    readers: list[str] = field(default_factory=list)
    closed: list[tuple[str, nn.Module]] = field(default_factory=list)


def find_sites(net: Net, shapes: Mapping[fx.Node, Shape] | None = None) -> tuple[tuple[Site, ...], tuple[Skipped, ...]]:
    """Every matrix of the model, in the order of its parameters, as a Site or as Skipped.

    shapes: of the nodes' outputs (``interpret.measure``), for counting FLOPs; without them sites have parameter
    counts only.
    """
    sites, skipped = [], []
    for found in locate(net).values():
        (name, *others), shape = found.names, tuple(found.parameter.shape)
        reason = why_not(found)
        if reason:
            skipped.append(Skipped(name, shape, reason, tuple(others)))
        else:
            in_eval = [use for use in found.uses if use.graph is net.graphs[False]]
            uses = tuple(Use(use.op, (shapes or {}).get(use.x)) for use in in_eval or found.uses)
            sites.append(Site(name, shape, uses, tuple(others)))
    return tuple(sites), tuple(skipped)


def locate(net: Net) -> dict[str, Located]:
    """Every parameter of two or more dimensions by its first name, with all that touches it in both graphs."""
    by_id: dict[int, Located] = {}
    for name, parameter in net.named_parameters(remove_duplicate=False):
        if parameter.ndim >= 2:
            by_id.setdefault(id(parameter), Located(parameter, [])).names.append(name)
    for graph in dict.fromkeys(net.graphs.values()):
        for node in graph.nodes:
            if node.op == "call_module":
                _visit_module(net, graph, node, by_id)
            elif node.op == "get_attr":
                found = by_id.get(id(attribute(net, str(node.target))))
                if found:
                    _visit_attribute(net, graph, node, found)
    return {found.names[0]: found for found in by_id.values()}


def attribute(net: nn.Module, path: str) -> Any:
    """What ``path`` names in the module tree."""
    return operator.attrgetter(path)(net)


def _visit_module(net: Net, graph: fx.Graph, node: fx.Node, by_id: dict[int, Located]) -> None:
    path = str(node.target)
    module = net.get_submodule(path)
    op = module_op(module)
    for parameter in module.parameters():
        found = by_id.get(id(parameter))
        if found is None:
            continue
        if op is not None and parameter is module._parameters.get("weight"):
            found.uses.append(NodeUse(graph, node, op, f"{path}.weight", own_bias=True))
        else:
            found.closed.append((path, module))


def _visit_attribute(net: Net, graph: fx.Graph, node: fx.Node, found: Located) -> None:
    for user in node.users:
        call = function_op(user, found.parameter.ndim)
        if (
            call is None
            or call.weight is not node
            or sum(node is n for n in user.all_input_nodes) > 1
            or node in (call.x, call.bias)
        ):
            found.readers.append(_describe_reader(user))
            continue
        # torch.export calls a shared weight by one of its names: the module that this call is may have another.
        modules = [name for name in (str(node.target), *found.names) if _is_module(net, name, call)]
        holder = modules[0] if modules else str(node.target)
        found.uses.append(NodeUse(graph, user, call.op, holder, own_bias=bool(modules)))


def _is_module(net: Net, name: str, call: Call) -> bool:
    """Whether the call is what the module that holds the weight by this name would do."""
    path, _, attr = name.rpartition(".")
    given = call.bias
    bias = attribute(net, str(given.target)) if isinstance(given, fx.Node) and given.op == "get_attr" else given
    if attr != "weight":
        return False
    module = net.get_submodule(path)
    return module_op(module) == call.op and module._parameters.get("bias") is bias


def _describe_reader(node: fx.Node) -> str:
    if node.op == "output":
        return "the output"
    if node.target is getattr:
        return f"`.{node.args[1]}`"
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return f"`{target.partition('.')[0]}`"


# What has no layout yet: the modules, how the names of the functions start, and the reason.
_NO_LAYOUT: tuple[tuple[tuple[type[nn.Module], ...], tuple[str, ...], str], ...] = (
    ((nn.Embedding, nn.EmbeddingBag), ("`embedding",), "embedding: it is read row by row, and has no layout yet"),
    ((nn.modules.conv._ConvTransposeNd,), ("`conv_transpose",), "transposed convolution: it has no layout yet"),
    ((nn.RNNBase, nn.RNNCellBase), ("`lstm", "`gru", "`rnn_"), "recurrent layer: its matrices have no layout yet"),
    ((nn.Bilinear,), ("`bilinear",), "bilinear form: it has no layout yet"),
)


def why_not(found: Located) -> str | None:
    """The reason, as a sentence, that this matrix cannot be a site; None if it can."""
    holder, inside, _ = f".{found.names[0]}".partition(".parametrizations.")
    if inside:
        return f"the weight of {holder[1:] or 'the model'} is computed from it by a parametrization"
    for modules, functions, reason in _NO_LAYOUT:
        closed = any(isinstance(module, modules) for _, module in found.closed)
        if closed or any(reader.startswith(functions) for reader in found.readers):
            kind = reason.partition(":")[0]
            return f"tied to an {kind}, which is not factored yet: both stay dense, and tied" if found.uses else reason
    for path, module in found.closed:
        return f"inside the {type(module).__name__} {path or 'itself'}: {_why_closed(module)}"
    if found.readers and found.uses:
        return f"read by {found.readers[0]} too, which needs the dense matrix"
    if found.readers:
        return f"not the weight of a linear or a convolution: it is used by {found.readers[0]}"
    if not found.uses:
        return "no operation of the graph uses it"
    if not found.parameter.is_floating_point():
        return f"its dtype is {found.parameter.dtype}, which has no truncated form"
    by_holder: dict[str, set[Op]] = {}
    for use in found.uses:
        by_holder.setdefault(use.holder, set()).add(use.op)
    if any(len(ops) > 1 for ops in by_holder.values()):
        return "one parameter serves convolutions of different stride, padding, dilation or groups"
    op = found.uses[0].op
    if len({use.op.groups for use in found.uses}) > 1:
        return "its convolutions have different numbers of groups"
    if op.groups > 1 and tuple(found.parameter.shape[:2]) == (op.groups, 1):
        return "depthwise convolution: rank 1 already"
    return None


def _why_closed(module: nn.Module) -> str:
    if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
        if has_hooks(module):
            return "a hook watches the module, and would be lost"
        if holds_more(module):
            return "it holds more than a weight and a bias"
        return "the class has a forward of its own"
    return "the tracer does not look into it (torch.export may)"
