"""Where every matrix of a model stands in its graphs: who holds it, who applies it, and who else touches it.

One walk for every kind of capture: a call of one of torch's layers, a functional, aten or method call on a parameter
or on a part of it, and a layer that untraced code calls, are the same Use.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import fx, nn
from torch.fx.node import Argument

from ..errors import PlanError
from ..ops import WHOLE, Call, LinearOp, Op, View, call_of, gather_index, module_op, parts_of, reads_metadata
from ..tracing import Net, Region, attribute, meta_of, regions, untraced


@dataclass(frozen=True)
class NodeUse:
    """One application of a weight. own_bias: the bias of the module that holds it serves; otherwise ``bias``.

    node: None where untraced code calls the module. weight: the node that gives the weight, or the part that is used;
    views: the nodes between the weight and that part.
    """

    op: Op
    holder: str
    own_bias: bool
    region: Region | None = None
    graph: fx.Graph | None = None
    node: fx.Node | None = None
    weight: fx.Node | None = None
    shape: tuple[int, ...] = ()
    views: tuple[fx.Node, ...] = ()

    @property
    def x(self) -> fx.Node | None:
        """The input, read from the node when asked for: rewriting another site may have replaced it."""
        if self.node is None or self.node.op != "call_module":
            call = self._call()
            return None if call is None else call.x
        x = self.node.args[0] if self.node.args else self.node.kwargs["input"]
        assert isinstance(x, fx.Node)
        return x

    @property
    def bias(self) -> Argument:
        """The bias that is given in the call: a node, or None for none."""
        call = self._call()
        return None if call is None else call.bias

    @property
    def at(self) -> fx.Node | None:
        """The node that says which matrices of a stack are gathered, where some are."""
        indices = (gather_index(view) for view in self.views)
        return next((index for index in indices if index is not None), None)

    def _call(self) -> Call | None:
        if self.node is None or self.weight is None:
            return None
        return call_of(self.node, self.weight, getattr(self.op, "view", WHOLE), self.shape)


@dataclass
class Located:
    """A matrix parameter and what touches it. readers: what needs the dense matrix; metadata: what asks for its shape
    or dtype only; closed: modules that no graph looks into; read_outside: by code that could not be traced. parts: the
    nodes that give a part of it, whether that is used or not.
    """

    parameter: nn.Parameter
    names: list[str]
    uses: list[NodeUse] = field(default_factory=list)
    readers: list[Reader] = field(default_factory=list)
    metadata: list[Reader] = field(default_factory=list)
    closed: list[tuple[str, nn.Module]] = field(default_factory=list)
    read_outside: bool = False
    parts: set[fx.Node] = field(default_factory=set)

    @property
    def by_code(self) -> bool:
        """Whether no graph applies it: untraced code calls the layers that do."""
        return all(use.node is None for use in self.uses)


@dataclass(frozen=True)
class Reader:
    """What reads a weight, or a part of it, and is no product with it. node: the first node that reads the weight."""

    region: Region
    graph: fx.Graph
    weight: fx.Node
    node: fx.Node
    holder: str
    words: str
    writes: bool = False


def locate(root: nn.Module) -> dict[str, Located]:
    """Every parameter of two or more dimensions by its first name, with all that touches it in every graph."""
    by_id: dict[int, Located] = {}
    for name, parameter in root.named_parameters(remove_duplicate=False):
        if parameter.ndim >= 2:
            by_id.setdefault(id(parameter), Located(parameter, [])).names.append(name)
    for region in regions(root):
        for graph in dict.fromkeys(region.net.graphs.values()):
            for node in graph.nodes:
                if node.op == "call_module":
                    _visit_module(region, graph, node, by_id)
                elif node.op == "get_attr":
                    matrix = by_id.get(id(attribute(region.net, str(node.target))))
                    if matrix:
                        _visit_attribute(root, region, graph, node, matrix)
    for path, module in untraced(root):
        op = module_op(module)
        for name, parameter in module.named_parameters(recurse=False):
            matrix = by_id.get(id(parameter))
            if matrix is not None and op is not None and name == "weight":
                matrix.uses.append(NodeUse(op, f"{path}.{name}" if path else name, own_bias=True))
            elif matrix is not None:
                matrix.closed.append((path, module))
    read = set(meta_of(root).get("read", ()))
    for matrix in by_id.values():
        matrix.read_outside = any(name.rpartition(".")[0] in read for name in matrix.names)
    return {matrix.names[0]: matrix for matrix in by_id.values()}


def refuse_non_finite(names: Iterable[str], located: Mapping[str, Located]) -> None:
    """Raises PlanError for a weight with a NaN or an infinity in it."""
    for name in names:
        if not bool(torch.isfinite(located[name].parameter).all()):
            raise PlanError(
                f"{name} has non-finite weights, which no factors can stand for: load sound weights, or exclude it"
            )


def input_of(matrix: Located) -> tuple[fx.Node, ...] | None:
    """What a plain linear with this weight reads, in each graph; None for a weight that could not share its input's
    factor with others: one with other names, other ops, or more than one use a graph.
    """
    graphs = [use.graph for use in matrix.uses]
    if len(matrix.names) > 1 or matrix.readers or None in graphs or len(set(graphs)) < len(graphs):
        return None
    inputs = tuple(use.x for use in matrix.uses if use.op == LinearOp() and use.x is not None)
    return inputs if len(inputs) == len(graphs) else None


def may_share(one: Located, other: Located) -> bool:
    """Whether two weights may share a right factor: in a graph they read one input; where the model's own code calls
    both layers, each applies the factor for itself, to whatever it reads.
    """
    if one.by_code and other.by_code:
        uses = [*one.uses, *other.uses]
        return len(one.names) == len(other.names) == 1 and all(use.op == LinearOp() for use in uses)
    return input_of(one) is not None and input_of(one) == input_of(other)


def _visit_module(region: Region, graph: fx.Graph, node: fx.Node, by_id: dict[int, Located]) -> None:
    path = str(node.target)
    module = region.net.get_submodule(path)
    if isinstance(module, Net):
        return
    op = module_op(module) if len(node.args) + len(node.kwargs) == 1 else None
    for parameter in module.parameters():
        matrix = by_id.get(id(parameter))
        if matrix is None:
            continue
        if op is not None and parameter is module._parameters.get("weight"):
            matrix.uses.append(NodeUse(op, region.full(f"{path}.weight"), True, region, graph, node))
        else:
            matrix.closed.append((region.full(path), module))


def _visit_attribute(root: nn.Module, region: Region, graph: fx.Graph, node: fx.Node, matrix: Located) -> None:
    """Follow the weight through its views to whoever uses them."""
    shape, target = tuple(matrix.parameter.shape), region.full(node.target)
    waiting: list[tuple[fx.Node, View, tuple[fx.Node, ...]]] = [(node, WHOLE, ())]
    while waiting:
        weight, view, path = waiting.pop()
        for user in list(weight.users):
            call = call_of(user, weight, view, view.shape(shape))
            if call is not None:
                given = (region, graph, user, weight, view.shape(shape), path)
                # torch.export calls a shared weight by one of its names: the module that this call is may have another.
                modules = [name for name in (target, *matrix.names) if _is_module(root, region, name, call)]
                matrix.uses.append(NodeUse(call.op, modules[0] if modules else target, bool(modules), *given))
                continue
            parts = parts_of(user, view, shape)
            if parts is not None:
                more = (*path, user)
                matrix.parts |= {user, *(part for part, _ in parts)}
                waiting += [(part, v, more if part is user else (*more, part)) for part, v in parts]
                continue
            first = path[0] if path else user
            reader = Reader(region, graph, node, first, target, _describe_reader(user), _writes(user, weight))
            (matrix.metadata if reads_metadata(user) else matrix.readers).append(reader)


def _is_module(root: nn.Module, region: Region, name: str, call: Call) -> bool:
    """Whether the call is what the module that holds the weight by this name would do."""
    path, _, attr = name.rpartition(".")
    if attr != "weight" or not name.startswith(region.prefix):
        return False
    given = call.bias
    bias = attribute(region.net, str(given.target)) if isinstance(given, fx.Node) and given.op == "get_attr" else given
    module = root.get_submodule(path)
    return module_op(module) == call.op and module._parameters.get("bias") is bias


def _writes(node: fx.Node, weight: fx.Node) -> bool:
    name = _target_name(node)
    in_place = name.endswith("_") and not name.endswith("__") and bool(node.args) and node.args[0] is weight
    return in_place or node.op == "output" or (node.target is getattr and node.args[1] in ("data", "grad"))


def _describe_reader(node: fx.Node) -> str:
    if node.op == "output":
        return "the output"
    if node.target is getattr:
        return f"`.{node.args[1]}`"
    return f"`{_target_name(node)}`"


def _target_name(node: fx.Node) -> str:
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return "getitem" if target == "index.Tensor" else target.partition(".")[0]
