"""Torch's own layers in the place of what inlining leaves as functions: what quantisers, adapters and people look for.

A site in LOW becomes one layer for each factor, under the factor's name (``fc1.right`` before ``fc1.left``), and a
dense one a layer under the name that it had (``fc1``).
"""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import fx, nn

from ..ops import WHOLE, Call, Shape, View, call_of, keeps_weight, layer_of, parts_of

_ALONE = "layer"  # the name of a dense layer that is the whole module


def as_layers_(graph_module: fx.GraphModule, sites: Collection[str], holders: Counter[int]) -> None:
    """Every call of a function with a whole weight, or a whole factor, becomes one of a layer that holds it.

    What torch has no layer for stays a function, and so do the calls of a factor that would have to be stored
    transposed beside another use of it, and those of other weights whose names would change.

    sites: the paths of the sites' modules. holders: under how many names each parameter stands in the whole model, by
    id.
    """
    graph, reads = graph_module.graph, _reads(graph_module)
    users = Counter(id(read.parameter) for read in reads for _ in read.node.users)
    of_target: dict[object, list[_Read]] = defaultdict(list)
    for each in reads:
        of_target[each.node.target].append(each)
    layers: dict[str, nn.Module] = {}
    for path, uses in _uses(reads).items():
        read, call = uses[0].read, uses[0].call
        same = [use for use in uses if (use.call.op, _target(use.call.bias)) == (call.op, _target(call.bias))]
        alone = holders[id(read.parameter)] == 1 and users[id(read.parameter)] == 1
        if not (read.site in sites or _is_layer(read, call)) or not (keeps_weight(call.op) or alone):
            continue
        biases = of_target.get(_target(call.bias), [])
        if call.bias is not None and not _is_own(biases, same):
            continue
        layer = layer_of(call.op, read.parameter, biases[0].parameter if biases else None)
        if layer is None:
            continue
        layer.training = graph_module.training
        layers[path] = layer
        for use in same:
            _call_layer(graph, use, path, layer)
        for bias in biases[:1]:
            del graph_module.get_submodule(bias.site)._parameters[bias.name]
    for path, layer in layers.items():
        _put(graph_module, path, layer)
    for read in reads:
        if not read.node.users:
            graph.erase_node(read.node)
        elif read.layer_path in layers:  # the layer holds it now
            read.node.target = f"{read.layer_path}.weight"
    if layers:
        graph_module.recompile()
        graph.lint()


def as_sequence(graph_module: fx.GraphModule, holders: Counter[int]) -> nn.Module:
    """A graph of one site: its layer where that is dense, an nn.Sequential of layers in order; else as it is."""
    as_layers_(graph_module, {""}, holders)
    first, *calls, output = graph_module.graph.nodes
    names, before = [], first
    for node in calls:
        if node.op != "call_module" or node.args != (before,):
            return graph_module
        before = node
        names.append(str(node.target))
    if not names or output.args != (before,) or len(set(names)) < len(names):
        return graph_module
    if names == [_ALONE]:
        return graph_module.get_submodule(_ALONE)
    chain = nn.Sequential(OrderedDict((name, graph_module.get_submodule(name)) for name in names))
    chain.training = graph_module.training
    return chain


@dataclass(frozen=True)
class _Read:
    """A node that reads a parameter. site: the path of the module that holds it."""

    node: fx.Node
    site: str
    name: str
    parameter: nn.Parameter

    @property
    def layer_path(self) -> str:
        """Where the layer that holds it stands: a dense weight's in the place of the site."""
        return self.site or _ALONE if self.name == "weight" else f"{self.site}.{self.name}".lstrip(".")

    @property
    def shape(self) -> Shape:
        return tuple(self.parameter.shape)


def _reads(graph_module: fx.GraphModule) -> list[_Read]:
    """Every read of a parameter."""
    nodes = [node for node in graph_module.graph.nodes if node.op == "get_attr"]
    places = [(node, *str(node.target).rpartition(".")[::2]) for node in nodes]
    held = [(*place, graph_module.get_submodule(place[1])._parameters.get(place[2])) for place in places]
    return [_Read(node, site, name, parameter) for node, site, name, parameter in held if parameter is not None]


@dataclass(frozen=True)
class _Use:
    """A call of an op on a parameter that is read, or on its transpose. weight: the node that gives that."""

    read: _Read
    weight: fx.Node
    view: View
    node: fx.Node
    call: Call

    @property
    def x(self) -> object:
        """The input as it stands now: it may have become a layer since the call was found."""
        call = call_of(self.node, self.weight, self.view, self.view.shape(self.read.shape))
        return None if call is None else call.x


def _uses(reads: Sequence[_Read]) -> dict[str, list[_Use]]:
    """The calls of ops on whole parameters, by where the layer would stand."""
    uses: dict[str, list[_Use]] = {}
    for read in (read for read in reads if read.parameter.ndim >= 2):
        weights = [(read.node, WHOLE)]
        for user in read.node.users:
            parts = parts_of(user, WHOLE, read.shape) or ()
            weights += [(part, view) for part, view in parts if view == View(transposed=True)]
        for weight, view in weights:
            for node in weight.users:
                call = call_of(node, weight, view, view.shape(read.shape))
                if call is not None:
                    uses.setdefault(read.layer_path, []).append(_Use(read, weight, view, node, call))
    # The first decides what the layer is: one that holds the weight as it is, where there is one.
    return {path: sorted(some, key=lambda use: not keeps_weight(use.call.op)) for path, some in uses.items()}


def _is_layer(read: _Read, call: Call) -> bool:
    """Whether a weight that is no site's has the names that a layer gives to its weight and its bias."""
    biases = (None, f"{read.site}.bias")
    return bool(read.site) and read.name == "weight" and keeps_weight(call.op) and _target(call.bias) in biases


def _target(bias: object) -> object:
    return bias.target if isinstance(bias, fx.Node) else bias


def _is_own(biases: Sequence[_Read], uses: Sequence[_Use]) -> bool:
    """Whether a bias is a parameter, a vector, that nothing but these uses of a weight reads."""
    readers = {node for bias in biases for node in bias.node.users}
    return bool(readers) and readers <= {use.node for use in uses} and biases[0].parameter.ndim == 1


def _call_layer(graph: fx.Graph, use: _Use, path: str, layer: nn.Module) -> None:
    x = use.x
    assert isinstance(x, fx.Node)
    with graph.inserting_before(use.node):
        new = graph.create_node("call_module", path, (x,))
    # Quantisers take the calls within one layer of torch for one call: the two factors are in layers of their own.
    around = {key: each for key, each in use.node.meta.get("nn_module_stack", {}).items() if each[0] != use.read.site}
    new.meta = use.node.meta | {"nn_module_stack": {**around, path: (path, type(layer))}}
    use.node.replace_all_uses_with(new)
    graph.erase_node(use.node)
    if use.weight is not use.read.node and not use.weight.users:
        graph.erase_node(use.weight)


def _put(graph_module: fx.GraphModule, path: str, layer: nn.Module) -> None:
    """The layer under its path, where its parameters stood."""
    parent, _, name = path.rpartition(".")
    holder = graph_module.get_submodule(parent)
    holder._parameters.pop(name, None)
    holder._modules[name] = layer
