"""Inline: the sites of a net opened into ordinary FX nodes, with nothing of this package left."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from ..errors import PlanError
from ..ops import has_hooks
from ..phase import Phase
from ..tracing import (
    Net,
    attribute,
    copy_graph,
    drop_dead_reads,
    forget_meta,
    meta_of,
    names_the_form_,
    refuse_parts,
    set_submodule,
    unwrap,
)
from .layers import as_layers_, as_sequence
from .loading import forget_states_
from .switched import STEM, TIED, Switched


def inline(net: nn.Module) -> nn.Module:
    """A copy of the net in its present setting and mode, with the factor operations of every site as ordinary FX nodes.

    The result is a plain GraphModule over plain modules and parameters (where only parts of a model were captured, the
    model's own class around them): nothing of this package is left in it. Tied weights stay tied. A net with a
    training and an evaluation graph gives the graph of its present mode.

    Args:
        net: What ``transform`` or ``factorize`` made, in any phase.

    Returns:
        The copy; the net stays as it is.

    Raises:
        PlanError: For a module that this package did not make.
    """
    source = unwrap(net)
    if not holds_captured(source):
        raise PlanError(f"{type(net).__name__} cannot be inlined: it was not made by transform or factorize")
    refuse_parts(source)
    return inline_(copy.deepcopy(source))


def inline_(net: nn.Module, *, layers: bool = False) -> nn.Module:
    """As ``inline``, over the net's own parameters: the net itself is of no use afterwards.

    layers: whether what the sites compute is made of torch's own layers, where it has such layers.
    """
    holders = (
        Counter(id(parameter) for _, parameter in net.named_parameters(remove_duplicate=False)) if layers else None
    )
    asked = {name: module.outline for name in _asked(net) if isinstance(module := net.get_submodule(name), Switched)}
    for name, part in reversed(list(net.named_modules())):
        if isinstance(part, Net):
            plain = _inlined(part, holders)
            if not name:
                return plain
            _keep_unread(part, plain)
            set_submodule(net, name, plain)
    _open_untraced_sites(net, holders)
    if layers:
        _outline_weights(net, asked)
    forget_meta(net)
    forget_states_(net)
    return net


def _asked(net: nn.Module) -> Iterable[str]:
    """The layers of whose weights untraced code asks for the dtype, the device or the shape."""
    return () if isinstance(net, Net) else meta_of(net).get("asked", ())


def _outline_weights(net: nn.Module, outlines: Mapping[str, Tensor]) -> None:
    """A ``weight`` for these modules where they have none: of the dense weight's shape, dtype and device, without
    memory, and not a number, so that nobody takes it for one.
    """
    for name, outline in outlines.items():
        module = net.get_submodule(name)
        if not hasattr(module, "weight"):
            nothing = torch.full((), torch.nan, dtype=outline.dtype, device=outline.device)
            module.register_buffer("weight", nothing.expand(outline.shape), persistent=False)


def holds_captured(module: nn.Module) -> bool:
    """Whether the module, or a part of it, was made by this package."""
    return any(isinstance(part, Net | Switched) for part in module.modules())


def _inlined(net: Net, holders: Counter[int] | None) -> fx.GraphModule:
    graph = copy_graph(net.graphs[net.training])
    for node in list(graph.nodes):
        if isinstance(node.type, str):  # an annotation left as text, which torch could not write out again
            node.type = None
        module = net.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, Switched):
            _open_site(graph, node, module)
        elif node.op == "get_attr" and isinstance(attribute(net, str(node.target)), Switched):
            _open_reads(net, graph, node)
    drop_dead_reads(graph, set())
    plain = fx.GraphModule(net, graph, class_name=type(net).__name__)
    for name, _ in plain.named_buffers():
        _keep_persistence(net, plain, name)
    plain.meta = {}  # the plan is of this package
    names_the_form_(plain, net)
    plain.graph.lint()
    plain.training = net.training
    if holders is not None:
        _refuse_hooks(net)
        sites = {path for path, module in net.named_modules(remove_duplicate=False) if isinstance(module, Switched)}
        as_layers_(plain, sites, holders)
    return plain


def _keep_unread(part: nn.Module, plain: nn.Module) -> None:
    """The parameters that the part's graph does not read: the code around it may."""
    for path, module in part.named_modules(remove_duplicate=False):
        if isinstance(module, Switched) or not module._parameters:
            continue
        holder = plain
        for name in path.split(".") if path else ():
            holder = holder._modules.setdefault(name, nn.Module())  # type: ignore[assignment]
        for name, parameter in module._parameters.items():
            if not hasattr(holder, name):
                holder.register_parameter(name, parameter)


def _keep_persistence(source: nn.Module, plain: nn.Module, name: str) -> None:
    path, _, attr = name.rpartition(".")
    if attr in source.get_submodule(path)._non_persistent_buffers_set:
        plain.get_submodule(path)._non_persistent_buffers_set.add(attr)


def _open_site(graph: fx.Graph, node: fx.Node, module: Switched) -> None:
    """The module's own forward, recorded with proxies in the node's place."""
    path, tracer, use = str(node.target), fx.proxy.GraphAppendingTracer(graph), int(node.kwargs.get("use", 0))  # type: ignore[arg-type]

    def read(name: str) -> fx.Proxy:
        return fx.Proxy(graph.create_node("get_attr", f"{path}.{name}".lstrip(".")), tracer)

    before = node.prev
    with graph.inserting_before(node):
        x, *given = (fx.Proxy(arg, tracer) if isinstance(arg, fx.Node) else arg for arg in node.args)
        at = fx.Proxy(node.kwargs["at"], tracer) if "at" in node.kwargs else None  # type: ignore[arg-type]
        own = module._parameters["bias"] is not None and not given and use != STEM
        bias = given[0] if given else read("bias") if own else None
        result = module.compute(read, x, bias, use, at)
    _replace(graph, node, result.node, before)


def _parameter_nodes(net: nn.Module, graph: fx.Graph, path: str, module: Switched) -> list[fx.Node]:
    """Reads of the dense weight, or of the factors, one of which may be another site's, and of the base."""
    paths = [f"{path}.{name}" for name in module.parameter_names]
    if module._buffers["base"] is not None:
        paths.append(f"{path}.base")
    if module.owner and len(paths) == 1 and module.phase != int(Phase.FULL):
        owner = next(name for name, each in net.named_modules() if each is module.owner[0])
        paths.append(f"{owner}.{module.layout.factor_names[1]}")
    return [graph.create_node("get_attr", each) for each in paths]


def _open_reads(net: nn.Module, graph: fx.Graph, node: fx.Node) -> None:
    """The reads of a site's ``weight`` or ``outline``, computed by ordinary nodes."""
    module = net.get_submodule(str(node.target))
    assert isinstance(module, Switched)
    for read in list(node.users):
        with graph.inserting_before(read):
            factors = _parameter_nodes(net, graph, str(node.target), module)
            if read.args[1] == "outline":
                empty = graph.call_method("new_empty", (factors[0], ()))
                result: fx.Node = graph.call_method("expand", (empty, module.shape))
            elif len(factors) == 1:
                result = factors[0]
            else:
                result = _joined(graph, module, factors)
        _replace(graph, read, result, read.prev)
    graph.erase_node(node)


def _joined(graph: fx.Graph, module: Switched, factors: list[fx.Node]) -> fx.Node:
    """The weight that the factors stand for, by the nodes that the layout's ``join`` consists of."""
    tensors: list[Tensor] = [factor.detach() for factor in module.factors]
    base = module._buffers["base"]

    def join(*tensors: Tensor) -> Tensor:
        count = len(module.factors)
        return module.joined(tensors[:count], *tensors[count:])

    with torch.no_grad():
        traced = make_fx(join)(*tensors, *([] if base is None else [base])).graph
    inputs = [node for node in traced.nodes if node.op == "placeholder"]
    result = graph.graph_copy(traced, dict(zip(inputs, factors, strict=True)))
    assert isinstance(result, fx.Node)
    return result


def _replace(graph: fx.Graph, node: fx.Node, result: fx.Node, before: fx.Node) -> None:
    """``result`` in the place of ``node``, the nodes made since ``before`` taking over where they come from."""
    new = before
    while (new := new.next) is not node:
        for key in ("nn_module_stack", "stack_trace"):
            if key in node.meta:
                new.meta[key] = node.meta[key]
    node.replace_all_uses_with(result)
    graph.erase_node(node)


_HOOKS = [name for name in vars(nn.Module()) if name.startswith(("_forward_", "_backward_"))]


def _refuse_hooks(net: Net) -> None:
    """What graphs call in a site's place has no hooks."""
    hooked = [module.site for module in net.modules() if isinstance(module, Switched) and has_hooks(module)]
    if hooked:
        raise PlanError(
            f"{hooked[0]} has a hook, which a graph without its sites would not run: remove the hook first, or "
            "transform with form=Form.LAYERS, where it stays"
        )


def _open_untraced_sites(root: nn.Module, holders: Counter[int] | None) -> None:
    """Sites that untraced code calls become graphs of their own, of the one op; of layers, a sequence or one layer."""
    for name, module in list(root.named_modules()):
        if isinstance(module, Switched):
            graph, holder = fx.Graph(), nn.Module()
            node = graph.create_node("call_module", "", (graph.placeholder("x"),))
            graph.output(node)
            _open_site(graph, node, module)
            factors = ("weight",) if module.phase == int(Phase.FULL) else module.layout.factor_names
            for key in (*factors, "bias"):
                holder.register_parameter(key, module.read(key))  # type: ignore[arg-type] # no buffer
            if module._buffers["base"] is not None:
                holder.register_buffer("base", module._buffers["base"])
            plain = fx.GraphModule(holder, graph)
            plain.training = module.training
            opened = plain if holders is None else as_sequence(plain, holders)
            if TIED in vars(module):
                vars(opened)[TIED] = vars(module)[TIED]
            for hooks in _HOOKS:  # the very dictionaries: whoever put a hook there holds on to them
                vars(opened)[hooks] = vars(module)[hooks]
            set_submodule(root, name, opened)
