"""The only graph surgery: factorize puts switchable sites in, inline opens them and leaves nothing of this package."""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from .errors import PlanError
from .finding import why_not
from .locate import Located, NodeUse, Reader, forget_meta, input_of, is_captured, locate, meta_of, regions
from .net import Net, copy_graph, unwrap
from .ops import Op
from .phase import Phase
from .plan import Plan, PlannedSite
from .recognize import module_op
from .switched import STEM, Switched, switched_modules


def factorize(net: nn.Module, plan: Plan) -> nn.Module:
    """A copy of the net with a Switched module, in phase FULL, at every site of the plan. One graph node per use.

    Raises PlanError where the plan does not fit the net.
    """
    twin = copy.deepcopy(net)
    factorize_(twin, plan)
    return twin


def factorize_(net: nn.Module, plan: Plan) -> None:
    """As ``factorize``, in the net itself. Nothing is changed where the plan does not fit."""
    located = locate(net)
    for row in plan.sites:
        found = located.get(row.site.name)
        if found is None or tuple(found.parameter.shape) != row.site.shape:
            raise PlanError(
                f"the plan factors {row.site.name} {row.site.shape}, which this net does not have: fit it first"
            )
        reason = why_not(found)
        if reason:
            raise PlanError(f"the plan factors {row.site.name}, which must stay dense: {reason}")
        if row.pack and input_of(found) != input_of(located[row.pack[0]]):
            raise PlanError(f"{row.site.name} does not read the input of {row.pack[0]} and cannot share its factor")
    for row in plan.sites:
        _put_site(net, row, located[row.site.name])
    for pack in dict.fromkeys(row.pack for row in plan.sites if row.pack):
        _share_input(net, pack, [located[name] for name in pack])
    for region in regions(net):
        for graph in dict.fromkeys(region.net.graphs.values()):
            _drop_dead_reads(graph, {view for found in located.values() for use in found.uses for view in use.views})
        region.net.refresh()
    set_plan(net, plan)
    specialize_(net)


def plan_of(net: nn.Module) -> Plan:
    """The plan a net was factored by. Raises PlanError for a module that ``factorize`` did not make."""
    root = unwrap(net)
    plan = meta_of(root).get("dynrank") if is_captured(root) else None
    if plan is None:
        raise PlanError(f"{type(net).__name__} has no plan: it was not made by transform or factorize")
    return plan


def set_plan(net: nn.Module, plan: Plan) -> None:
    """Note the plan in the net's ``meta``, which survives ``deepcopy``."""
    meta_of(net)["dynrank"] = plan


def specialize_(root: nn.Module) -> None:
    """Run the code of the present setting in every Net of the tree: after phases or ranks have changed."""
    for region in regions(root):
        sites = switched_modules(region.net).values()
        region.net.specialize(tuple((modules[0].phase, modules[0].rank) for modules in sites))


def _put_site(net: nn.Module, row: PlannedSite, found: Located) -> None:
    """Every holder of the weight becomes a Switched over the same Parameter, and every use a call of its holder's."""
    ops: dict[str, list[Op]] = {}
    for use in found.uses:
        ops.setdefault(use.holder, []).append(use.op)
    placed: dict[int, tuple[nn.Module, Switched]] = {}  # one module under two names stays one; the old one keeps its id
    paths = {name: _replace_holder(net, row, name, ops, found.uses[0].op, placed) for name in found.names}
    for use in found.uses:
        if use.node is not None:
            _call_site(use, paths[use.holder], net)
    for reader in found.readers:
        _read_site(reader, paths[reader.holder], "weight")
    for reader in found.metadata:
        _read_site(reader, paths[reader.holder], "outline")


def _replace_holder(
    net: nn.Module,
    row: PlannedSite,
    name: str,
    ops: dict[str, list[Op]],
    any_op: Op,
    placed: dict[int, tuple[nn.Module, Switched]],
) -> str:
    """Put a Switched where ``name`` was; returns its path: that of the module, or of the parameter if it stood bare."""
    path, _, attr = name.rpartition(".")
    holder = net.get_submodule(path)
    if id(holder) in placed and attr == "weight":
        _set_submodule(net, path, placed[id(holder)][1])
        return path
    if isinstance(holder, Switched):
        return path
    if isinstance(holder._modules.get(attr), Switched):
        return name
    weight = holder._parameters[attr]
    assert weight is not None
    own = module_op(holder)
    kept = list(dict.fromkeys([*([own] if own else []), *ops.get(name, ())])) or [any_op]
    if path and not isinstance(holder, Net) and _holds_only_this(holder, attr):
        bias = holder._parameters.get("bias")
        site = Switched(kept, row.layout, row.rank, weight, bias, site=row.site.name)
        for constant, value in vars(holder).items():  # in_features, kernel_size, ...: what code reads of a layer
            if not constant.startswith("_") and constant not in vars(site):
                setattr(site, constant, value)
        site.training = holder.training
        placed[id(holder)] = (holder, site)
        _set_submodule(net, path, site)
        return path
    del holder._parameters[attr]
    holder._modules[attr] = Switched(kept, row.layout, row.rank, weight, None, site=row.site.name, bare=True)
    return name


def _holds_only_this(holder: nn.Module, attr: str) -> bool:
    return (
        attr == "weight"
        and not holder._modules
        and not holder._buffers
        and set(holder._parameters) <= {"weight", "bias"}
    )


def _set_submodule(net: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    net.get_submodule(parent)._modules[name] = module


def _call_site(use: NodeUse, path: str, net: nn.Module) -> None:
    graph, node, region = use.graph, use.node, use.region
    assert graph is not None
    assert node is not None
    assert region is not None
    module = net.get_submodule(path)
    assert isinstance(module, Switched)
    own, x, bias = module._parameters.get("bias"), use.x, None if use.own_bias else use.bias
    args: tuple[Any, ...] = (x,) if use.own_bias or (bias is None and own is None) else (x, bias)
    number = module.ops.index(use.op)
    kwargs: dict[str, Any] = {"use": number} if number else {}
    if use.at is not None:
        kwargs["at"] = use.at
    target = path.removeprefix(region.prefix)
    if node.op == "call_module":
        node.target, node.args, node.kwargs = target, args, kwargs
        return
    with graph.inserting_before(node):
        call = graph.create_node("call_module", target, args, kwargs, name=node.name)
    call.meta = dict(node.meta)
    node.replace_all_uses_with(call)
    graph.erase_node(node)


def _share_input(net: nn.Module, pack: tuple[str, ...], members: Sequence[Located]) -> None:
    """The sites of a pack take the output of the shared factor, which is computed once in each graph."""
    modules = [module for module in net.modules() if isinstance(module, Switched) and module.site in pack]
    owner = next(module for module in modules if module.site == pack[0])
    for module in modules:
        module.join_pack(pack, owner)
    for region in regions(net):
        paths = {name: module for name, module in region.net.named_modules() if module in modules}
        for graph in dict.fromkeys(region.net.graphs.values()):
            calls = [node for node in graph.nodes if node.op == "call_module" and node.target in paths]
            if not calls:
                continue
            target = next(name for name, module in paths.items() if module is owner)
            with graph.inserting_before(calls[0]):
                stem = graph.call_module(target, (calls[0].args[0],), {"use": STEM})
            for node in calls:
                node.args = (stem, *node.args[1:])


def _read_site(reader: Reader, path: str, attr: str) -> None:
    """What reads a weight by itself reads this property of the site instead, in every phase."""
    if reader.weight not in reader.node.all_input_nodes:
        return  # another reader has come this way
    with reader.graph.inserting_before(reader.weight):
        module = reader.graph.create_node("get_attr", path.removeprefix(reader.region.prefix))
        value = reader.graph.call_function(getattr, (module, attr))
    reader.node.replace_input_with(reader.weight, value)


def _drop_dead_reads(graph: fx.Graph, views: set[fx.Node]) -> None:
    """Reads of weights, and of parts of them, that no node uses any more. Not eliminate_dead_code: it would drop
    in-place updates.
    """
    for node in reversed(list(graph.nodes)):
        if (node.op == "get_attr" or node in views) and not node.users:
            graph.erase_node(node)


def inline(net: nn.Module) -> nn.Module:
    """A copy of the net in its present setting and mode, with the factor operations of every site as ordinary FX nodes.

    The result is a plain GraphModule over plain modules and parameters (where only parts of a model were captured, the
    model's own class around them): nothing of this package is left in it. Tied weights stay tied. A net with a
    training and an evaluation graph gives the graph of its present mode.
    """
    source = unwrap(net)
    if not holds_captured(source):
        raise PlanError(f"{type(net).__name__} cannot be inlined: it was not made by transform or factorize")
    twin = copy.deepcopy(source)
    for name, part in reversed(list(twin.named_modules())):
        if isinstance(part, Net):
            plain = _inlined(part)
            if not name:
                return plain
            _keep_unread(part, plain)
            _set_submodule(twin, name, plain)
    _open_untraced_sites(twin)
    forget_meta(twin)
    return twin


def holds_captured(module: nn.Module) -> bool:
    """Whether the module, or a part of it, was made by this package."""
    return any(isinstance(part, Net | Switched) for part in module.modules())


def _inlined(net: Net) -> fx.GraphModule:
    graph = copy_graph(net.graphs[net.training])
    for node in list(graph.nodes):
        if isinstance(node.type, str):  # an annotation left as text, which torch could not write out again
            node.type = None
        module = net.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, Switched):
            _open_site(graph, node, module)
        elif node.op == "get_attr" and isinstance(_attribute(net, str(node.target)), Switched):
            _open_reads(net, graph, node)
    _drop_dead_reads(graph, set())
    plain = fx.GraphModule(net, graph, class_name=type(net).__name__)
    for name, _ in plain.named_buffers():
        _keep_persistence(net, plain, name)
    plain.meta = {}  # the plan is of this package
    plain.graph.lint()
    plain.training = net.training
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


def _attribute(net: nn.Module, path: str) -> Any:
    return operator.attrgetter(path)(net)


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
        dense = module.parameter_names == ("weight",)
        result: Any
        own = module._parameters["bias"] is not None and not given and use != STEM
        bias = given[0] if given else read("bias") if own else None
        *first, (op, name) = module.stages[max(use, 0)]
        if use == STEM:
            stage, factor = first[0]
            result = x if dense else stage(x, read(factor))
        elif dense:
            result = module.ops[use](x, read("weight"), bias, at)
        else:
            for stage, factor in () if module.pack else first:
                x = stage(x, read(factor), None, at)
            result = op(x, read(name), bias, at)
    _replace(graph, node, result.node, before)


def _parameter_nodes(net: nn.Module, graph: fx.Graph, path: str, module: Switched) -> list[fx.Node]:
    """Reads of the dense weight, or of both factors, one of which may be another site's."""
    paths = [f"{path}.{name}" for name in module.parameter_names]
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
                empty = graph.call_method("new_empty", (factors[-1], ()))
                result: Any = graph.call_method("expand", (empty, module.shape))
            elif len(factors) == 1:
                result = factors[0]
            else:
                result = _joined(graph, module, factors)
        _replace(graph, read, result, read.prev)
    graph.erase_node(node)


def _joined(graph: fx.Graph, module: Switched, factors: list[fx.Node]) -> fx.Node:
    """The product of the factors, by the nodes that the layout's ``join`` consists of."""

    def join(left: Tensor, right: Tensor) -> Tensor:
        return module.layout.join((left, right))

    with torch.no_grad():
        traced = make_fx(join)(*(factor.detach() for factor in module.factors)).graph
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


def _open_untraced_sites(root: nn.Module) -> None:
    """Sites that untraced code calls become graphs of their own, of the one op."""
    for name, module in list(root.named_modules()):
        if isinstance(module, Switched):
            graph, holder = fx.Graph(), nn.Module()
            node = graph.create_node("call_module", "", (graph.placeholder("x"),))
            graph.output(node)
            _open_site(graph, node, module)
            for key in (*module.parameter_names, "bias"):
                holder.register_parameter(key, module._parameters[key])
            plain = fx.GraphModule(holder, graph)
            plain.training = module.training
            _set_submodule(root, name, plain)
