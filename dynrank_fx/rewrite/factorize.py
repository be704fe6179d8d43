"""Factorize: a switchable site in the place of every weight of a plan, and of each of its uses in the graphs."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

from torch import fx, nn
from torch.fx.node import Argument

from ..errors import PlanError
from ..ops import Op, module_op
from ..plan import Located, NodeUse, Plan, PlannedSite, Reader, checked_plan, locate, may_share, why_not
from ..tracing import Net, drop_dead_reads, regions, set_submodule, unwrap
from .loading import follows_states_
from .meta import note_given, set_plan, specialize_
from .pretrained import watch_pretrained_
from .switched import STEM, TIED, Switched, switched_modules


def factorize(net: nn.Module, plan: Plan) -> nn.Module:
    """A copy of a captured net with a switchable site, in phase FULL, at every weight of a plan.

    Each use of a weight is one node of the graph.

    Args:
        net: What ``capture`` made.
        plan: The weights to factor; see ``make_plan``.

    Returns:
        The new net; the given one stays as it is.

    Raises:
        PlanError: Where the plan does not fit the net.
    """
    twin = copy.deepcopy(unwrap(net))
    factorize_(twin, plan)
    return twin


def factorize_(net: nn.Module, plan: Plan, located: Mapping[str, Located] | None = None) -> None:
    """As ``factorize``, in the net itself. Nothing is changed where the plan does not fit.

    located: what ``locate`` found in the net, if that is known already.
    """
    checked_plan(plan)
    located = locate(net) if located is None else located
    for row in plan.sites:
        matrix = located.get(row.site.name)
        if matrix is None or tuple(matrix.parameter.shape) != row.site.shape:
            raise PlanError(
                f"the plan factors {row.site.name} {row.site.shape}, which this net does not have: fit it first"
            )
        reason = why_not(matrix)
        if reason:
            raise PlanError(f"the plan factors {row.site.name}, which must stay dense: {reason}")
        if row.sharing and not may_share(matrix, located[row.sharing[0]]):
            raise PlanError(f"{row.site.name} does not read the input of {row.sharing[0]} and cannot share its factor")
    for row in plan.sites:
        _put_site(net, row, located[row.site.name])
    _share_inputs(net, {row.sharing: located[row.sharing[0]] for row in plan.sites if row.sharing})
    for region in regions(net):
        for graph in dict.fromkeys(region.net.graphs.values()):
            drop_dead_reads(graph, {part for matrix in located.values() for part in matrix.parts})
        region.net.refresh()
    _tell_ties(net)
    watch_pretrained_(net, [name for row in plan.sites for name in located[row.site.name].names])
    set_plan(net, plan)
    note_given(net)
    follows_states_(net)
    specialize_(net)


def _tell_ties(net: nn.Module) -> None:
    """Hugging Face's files hold a tied parameter once, and ask every module for the names to leave out: all modules of
    a site but the first name its factors, and a site that shares the right factor of another names that.
    """
    for first, *others in switched_modules(net).values():
        right = first.layout.factor_names[1:] if first.owner else ()
        for module, names in ((first, right), *((other, first.layout.factor_names) for other in others)):
            if names:  # in what is made of the net they may be layers
                vars(module)[TIED] = {rf"({'|'.join(names)})(\.weight|\.bias)?$": ""}


def _put_site(net: nn.Module, row: PlannedSite, matrix: Located) -> None:
    """Every holder of the weight becomes a Switched over the same Parameter, and every use a call of its holder's."""

    def place(name: str) -> tuple[int, str]:
        """Of a parameter: the same for all names of one module."""
        path, _, attr = name.rpartition(".")
        return id(net.get_submodule(path)), attr

    of_place: dict[tuple[int, str], list[Op]] = {}
    for use in matrix.uses:
        of_place.setdefault(place(use.holder), []).append(use.op)
    ops = {name: of_place.get(place(name), []) for name in matrix.names}
    placed: dict[int, tuple[nn.Module, Switched]] = {}  # one module under two names stays one; the old one keeps its id
    paths = {name: _replace_holder(net, row, name, ops, matrix.uses[0].op, placed) for name in matrix.names}
    for use in matrix.uses:
        if use.node is not None:
            _call_site(use, paths[use.holder], net)
    for reader in matrix.readers:
        _read_site(reader, paths[reader.holder], "weight")
    for reader in matrix.metadata:
        _read_site(reader, paths[reader.holder], "outline")


def _replace_holder(
    net: nn.Module,
    row: PlannedSite,
    name: str,
    ops: Mapping[str, Sequence[Op]],
    any_op: Op,
    placed: dict[int, tuple[nn.Module, Switched]],
) -> str:
    """Put a Switched where ``name`` was; returns its path: that of the module, or of the parameter if it stood bare."""
    path, _, attr = name.rpartition(".")
    holder = net.get_submodule(path)
    if id(holder) in placed and attr == "weight":
        set_submodule(net, path, placed[id(holder)][1])
        return path
    if isinstance(holder, Switched):
        return path
    if isinstance(holder._modules.get(attr), Switched):
        return name
    weight = holder._parameters[attr]
    assert weight is not None
    own = module_op(holder)
    kept = list(dict.fromkeys([*([own] if own else []), *ops[name]])) or [any_op]
    if path and not isinstance(holder, Net) and _holds_only_this(holder, attr):
        bias = holder._parameters.get("bias")
        site = Switched(kept, row.layout, row.rank, weight, bias, site=row.site.name)
        for constant, value in vars(holder).items():  # in_features, kernel_size, ...: what code reads of a layer
            if not constant.startswith("_") and not hasattr(site, constant):
                setattr(site, constant, value)
        site.training = holder.training
        placed[id(holder)] = (holder, site)
        set_submodule(net, path, site)
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


def _call_site(use: NodeUse, path: str, net: nn.Module) -> None:
    graph, node, region = use.graph, use.node, use.region
    assert graph is not None
    assert node is not None
    assert region is not None
    module = net.get_submodule(path)
    assert isinstance(module, Switched)
    own, x, bias = module._parameters.get("bias"), use.x, None if use.own_bias else use.bias
    args: tuple[Argument, ...] = (x,) if use.own_bias or (bias is None and own is None) else (x, bias)
    number = module.ops.index(use.op)
    kwargs: dict[str, Argument] = {"use": number} if number else {}
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


def _share_inputs(net: nn.Module, groups: Mapping[tuple[str, ...], Located]) -> None:
    """The sites of each group take the output of their shared factor, which is computed once in each graph; those that
    the model's own code calls compute it each for itself. groups: the names, with the first of each.
    """
    if not groups:
        return
    sites = switched_modules(net)
    for names, first in groups.items():
        for module in (module for name in names for module in sites[name]):
            module.share_right(names, sites[names[0]][0], after_stem=not first.by_code)
    for region in regions(net):
        paths = {
            name: module
            for name, module in region.net.named_modules()
            if isinstance(module, Switched) and module.after_stem
        }
        owners = {module.sharing: name for name, module in paths.items() if not module.owner}
        for graph in dict.fromkeys(region.net.graphs.values()):
            calls: dict[tuple[str, ...], list[fx.Node]] = {}
            for node in graph.nodes:
                if node.op == "call_module" and node.target in paths:
                    calls.setdefault(paths[node.target].sharing, []).append(node)
            for names, nodes in calls.items():
                with graph.inserting_before(nodes[0]):
                    stem = graph.call_module(owners[names], (nodes[0].args[0],), {"use": STEM})
                for node in nodes:
                    node.args = (stem, *node.args[1:])


def _read_site(reader: Reader, path: str, attr: str) -> None:
    """What reads a weight by itself reads this property of the site instead, in every phase."""
    if reader.weight not in reader.node.all_input_nodes:
        return  # another reader has come this way
    with reader.graph.inserting_before(reader.weight):
        module = reader.graph.create_node("get_attr", path.removeprefix(reader.region.prefix))
        value = reader.graph.call_function(getattr, (module, attr))
    reader.node.replace_input_with(reader.weight, value)
