"""One layer for the first factors of layers that read one value: x R₁ᵀ, …, x Rₖᵀ are the parts of x [R₁; …; Rₖ]ᵀ."""

from __future__ import annotations

import operator
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import fx, nn

from ..errors import PlanError


def stack_firsts_(module: nn.Module) -> None:
    """Stack the first factors of linear layers, in what ``inline_`` made of a net, of layers. ``query.right``,
    ``key.right`` and ``value.right`` become ``query_key_value.right``, of which each left factor takes its part.

    A factor that is called several times, or held under several names, stays. Raises PlanError where there is no graph.
    """
    graphs = [part for part in module.modules() if isinstance(part, fx.GraphModule)]
    if not graphs:
        raise PlanError(
            f"{type(module).__name__} has no graph in which layers that read one value could be found, since its "
            "own code calls them (form=Form.LAYERS, or a model traced module by module): leave stacked out"
        )
    holders = Counter(id(parameter) for _, parameter in module.named_parameters(remove_duplicate=False))
    for graph_module in graphs:
        together: dict[object, list[_First]] = defaultdict(list)
        for first in _firsts(graph_module, holders):
            together[first.kind].append(first)
        for some in together.values():
            if len(some) > 1:
                _stack(graph_module, some)
        graph_module.graph.lint()
        graph_module.recompile()


@dataclass(frozen=True)
class _First:
    """A call of a first factor, and the layer."""

    node: fx.Node
    layer: nn.Linear

    @property
    def path(self) -> list[str]:
        return str(self.node.target).split(".")

    @property
    def kind(self) -> object:
        """The same for those that can become one."""
        weight = self.layer.weight
        return self.node.args, self.path[-1], weight.dtype, weight.device, weight.requires_grad


def _firsts(graph_module: fx.GraphModule, holders: Counter[int]) -> Iterator[_First]:
    """The first factors: layers without bias that go into the other factor of the same site, and nowhere else."""
    calls = Counter(node.target for node in graph_module.graph.nodes if node.op == "call_module")
    for node in graph_module.graph.nodes:
        layer = graph_module.get_submodule(node.target) if node.op == "call_module" else None
        if type(layer) is not nn.Linear or layer.bias is not None:
            continue
        site, _, name = node.target.rpartition(".")
        last = f"{site}.{ {'right': 'left', 'left': 'right'}.get(name, '') }".lstrip(".")
        alone = calls[node.target] == 1 and holders[id(layer.weight)] == 1
        if alone and node.users and all(user.op == "call_module" and user.target == last for user in node.users):
            yield _First(node, layer)


def _stack(graph_module: fx.GraphModule, firsts: Sequence[_First]) -> None:
    graph, (node, layer) = graph_module.graph, (firsts[0].node, firsts[0].layer)
    path = _path(graph_module, [each.path for each in firsts])
    sizes = [each.layer.out_features for each in firsts]
    stacked = nn.Linear(layer.in_features, sum(sizes), bias=False, device="meta")
    weights = torch.cat([each.layer.weight.detach() for each in firsts])
    stacked.weight = nn.Parameter(weights, requires_grad=layer.weight.requires_grad)
    stacked.training = layer.training
    graph_module.add_submodule(path, stacked)
    with graph.inserting_before(node):
        whole = graph.call_module(path, node.args)
        parts = graph.call_function(torch.split, (whole, sizes, -1))
        around = {key: each for key, each in node.meta.get("nn_module_stack", {}).items() if key != node.target}
        whole.meta["nn_module_stack"] = {**around, path: (path, nn.Linear)}
        results = [graph.call_function(operator.getitem, (parts, i)) for i in range(len(sizes))]
    for each, result in zip(firsts, results, strict=True):
        each.node.replace_all_uses_with(result)
        graph.erase_node(each.node)
        graph_module.delete_submodule(str(each.node.target))


def _path(graph_module: fx.GraphModule, paths: Sequence[Sequence[str]]) -> str:
    """What is the same at the beginning, then the rest of all in one name that is free, then the name of the factor."""
    head = sum(1 for _ in takewhile(lambda each: len(set(each)) == 1, zip(*(p[:-1] for p in paths), strict=False)))
    holder = graph_module.get_submodule(".".join(paths[0][:head]))
    name = "_".join("_".join(path[head:-1]) for path in paths)
    while hasattr(holder, name):
        name += "_"
    return ".".join([*paths[0][:head], name, paths[0][-1]])
