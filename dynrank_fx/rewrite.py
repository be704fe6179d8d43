"""The only graph surgery: factorize puts switchable sites in, inline opens them and leaves nothing of this package."""

from __future__ import annotations

import copy
from typing import Any

from torch import fx, nn

from .errors import PlanError
from .net import Net, copy_graph, unwrap
from .ops import Op
from .plan import Plan, PlannedSite
from .sites import Located, NodeUse, locate, module_op, why_not
from .switched import Switched, switched_modules


def factorize(net: Net, plan: Plan) -> Net:
    """A copy of the net with a Switched module, in phase FULL, at every site of the plan. One graph node per use.

    Raises PlanError where the plan does not fit the net.
    """
    twin = copy.deepcopy(net)
    factorize_(twin, plan)
    return twin


def factorize_(net: Net, plan: Plan) -> None:
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
    for row in plan.sites:
        _put_site(net, row, located[row.site.name])
    for graph in dict.fromkeys(net.graphs.values()):
        _drop_dead_reads(graph)
    set_plan(net, plan)
    net.refresh()
    specialize_(net)


def plan_of(net: nn.Module) -> Plan:
    """The plan a net was factored by. Raises PlanError for a module that ``factorize`` did not make."""
    plan = getattr(unwrap(net), "meta", {}).get("dynrank")
    if plan is None:
        raise PlanError(f"{type(net).__name__} has no plan: it was not made by transform or factorize")
    return plan


def set_plan(net: nn.Module, plan: Plan) -> None:
    """Note the plan in the net's ``meta``, which survives ``deepcopy``."""
    net.meta["dynrank"] = plan  # type: ignore[index,operator,assignment]


def specialize_(root: nn.Module) -> None:
    """Run the code of the present setting in every Net of the tree: after phases or ranks have changed."""
    for net in root.modules():
        if isinstance(net, Net):
            sites = switched_modules(net).values()
            net.specialize(tuple((modules[0].phase, modules[0].rank) for modules in sites))


def _put_site(net: Net, row: PlannedSite, found: Located) -> None:
    """Every holder of the weight becomes a Switched over the same Parameter, and every use a call of its holder's."""
    ops = {use.holder: use.op for use in found.uses}
    any_op = found.uses[0].op
    placed: dict[int, tuple[nn.Module, Switched]] = {}  # one module under two names stays one; the old one keeps its id
    paths: dict[str, str] = {}
    for name in found.names:
        paths[name] = _replace_holder(net, row, name, ops, any_op, placed)
    for use in found.uses:
        _call_site(use, paths[use.holder], net)


def _replace_holder(
    net: Net,
    row: PlannedSite,
    name: str,
    ops: dict[str, Op],
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
    op = ops.get(name) or module_op(holder) or any_op
    if path and _holds_only_this(holder, attr):
        site = Switched(op, row.layout, row.rank, weight, holder._parameters.get("bias"), site=row.site.name)
        for constant in getattr(
            holder, "__constants__", ()
        ):  # in_features, kernel_size, ...: what code reads of a layer
            if hasattr(holder, constant):
                setattr(site, constant, getattr(holder, constant))
        site.training = holder.training
        placed[id(holder)] = (holder, site)
        _set_submodule(net, path, site)
        return path
    del holder._parameters[attr]
    holder._modules[attr] = Switched(op, row.layout, row.rank, weight, None, site=row.site.name, bare=True)
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


def _call_site(use: NodeUse, path: str, net: Net) -> None:
    graph, node = use.graph, use.node
    module = net.get_submodule(path)
    own = module._parameters.get("bias")
    args: tuple[Any, ...] = (use.x,)
    if not use.own_bias and (use.bias is not None or own is not None):
        args = (use.x, use.bias)
    if node.op == "call_module":
        node.target, node.args, node.kwargs = path, args, {}
        return
    with graph.inserting_before(node):
        call = graph.create_node("call_module", path, args, name=node.name)
    call.meta = dict(node.meta)
    node.replace_all_uses_with(call)
    graph.erase_node(node)


def _drop_dead_reads(graph: fx.Graph) -> None:
    """Reads of weights that no node uses any more. Not eliminate_dead_code: it would drop in-place updates."""
    for node in reversed(list(graph.nodes)):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)


def inline(net: nn.Module) -> fx.GraphModule:
    """A copy of the net in its present setting and mode, with the factor operations of every site as ordinary FX nodes.

    The result is a plain GraphModule over plain modules and parameters: nothing of this package is left in it. Tied
    weights stay tied. A net with a training and an evaluation graph gives the graph of its present mode.
    """
    source = unwrap(net)
    if not isinstance(source, Net):
        raise PlanError(f"{type(net).__name__} cannot be inlined: it was not made by transform or factorize")
    twin = copy.deepcopy(source)
    graph = copy_graph(twin.graphs[twin.training])
    for node in list(graph.nodes):
        if isinstance(node.type, str):  # an annotation left as text, which torch could not write out again
            node.type = None
        module = twin.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, Switched):
            _open_site(graph, node, module)
    _drop_dead_reads(graph)
    plain = fx.GraphModule(twin, graph, class_name=type(source).__name__)
    for name, _ in plain.named_buffers():
        _keep_persistence(twin, plain, name)
    plain.meta = {}  # the plan is of this package
    plain.graph.lint()
    plain.training = twin.training
    return plain


def _keep_persistence(source: nn.Module, plain: nn.Module, name: str) -> None:
    path, _, attr = name.rpartition(".")
    if attr in source.get_submodule(path)._non_persistent_buffers_set:
        plain.get_submodule(path)._non_persistent_buffers_set.add(attr)


def _open_site(graph: fx.Graph, node: fx.Node, module: Switched) -> None:
    """The module's own forward, recorded with proxies in the node's place."""
    path, tracer = str(node.target), fx.proxy.GraphAppendingTracer(graph)

    def read(name: str) -> fx.Proxy:
        return fx.Proxy(graph.create_node("get_attr", f"{path}.{name}"), tracer)

    new = node.prev
    with graph.inserting_before(node):
        x, *given = (fx.Proxy(arg, tracer) if isinstance(arg, fx.Node) else arg for arg in node.args)
        bias = given[0] if given else read("bias") if module._parameters["bias"] is not None else None
        if module.parameter_names == ("weight",):
            result = module.op(x, read("weight"), bias)
        else:
            *first, (op, name) = module.stages
            for stage, factor in first:
                x = stage(x, read(factor))
            result = op(x, read(name), bias)
    while (new := new.next) is not node:
        new.meta = {key: node.meta[key] for key in ("nn_module_stack", "stack_trace") if key in node.meta}
    node.replace_all_uses_with(result.node)
    graph.erase_node(node)
