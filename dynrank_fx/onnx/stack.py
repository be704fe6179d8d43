"""One product for the right factors that read one value.

x R₁ᵀ, …, x Rₖᵀ are the parts of x [R₁; …; Rₖ]ᵀ: one product and a split, where there were k thin products. Every number
is computed from the same numbers as before.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

_PRODUCTS = ("MatMul", "Gemm")
_RANKS = "_ranks"  # of a stack, behind its name: the weight that Split takes
_SPLIT_BY_INPUT = 13  # the opset since which Split takes the sizes as an input


def is_stack(weight: str) -> bool:
    """Whether a weight, by its name, is a stack of several: ``attention.{query,key,value}.right.weight``."""
    return "{" in weight


def stacks_in(model: ModelProto) -> dict[str, int]:
    """How many right factors each stack of a model holds, by the name of the stack."""
    sizes = {
        each.name.removesuffix(_RANKS): each.dims for each in model.graph.initializer if each.name.endswith(_RANKS)
    }
    return {name: dims[0] for name, dims in sizes.items() if is_stack(name)}


def stack_rights_(model: ModelProto) -> None:
    """Stack the right factors of products that read one value; where weights are used several times, of those that read
    the same values in the same order.

    A right factor is known by where its product goes: into products with other stored matrices, and nowhere else. So
    dense weights stay, and so does a factor that anything else reads. Convolutions stay too: onnxruntime runs them on
    blocks of channels, which a split would undo.
    """
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    if opset < _SPLIT_BY_INPUT:
        return
    weights = {each.name: each for each in model.graph.initializer if len(each.dims) == 2}
    found = _Products(model.graph, weights).of_right_factors()
    alike: dict[object, list[str]] = defaultdict(list)
    for name, products in found.items():
        alike[tuple(each.kind for each in products)].append(name)
    new: dict[str, list[NodeProto]] = {}
    for names in alike.values():
        if len(names) > 1:
            new |= _stacked(model.graph, [weights[name] for name in names], [found[name] for name in names])
    nodes = [each for node in model.graph.node for each in new.get(node.output[0], [node])]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    made = {name for node in nodes for name in node.output}
    for i in reversed(range(len(model.graph.value_info))):
        if model.graph.value_info[i].name not in made:
            del model.graph.value_info[i]


@dataclass(frozen=True)
class _Product:
    """A product of a value with a stored matrix. turned: the node that transposes the matrix, if one does. axis: of the
    matrix, along which the columns of the result lie.
    """

    node: NodeProto
    turned: NodeProto | None
    axis: int

    @property
    def kind(self) -> object:
        """The same for products that can become one."""
        settings = sorted(attribute.SerializeToString() for attribute in self.node.attribute)
        return self.node.input[0], self.node.op_type, self.axis, self.turned is None, *settings


class _Products:
    """The products of a graph: who reads a value, and what is read in a graph inside it or given out."""

    def __init__(self, graph: GraphProto, weights: Mapping[str, TensorProto]) -> None:
        self.weights = weights
        self.readers: dict[str, list[NodeProto]] = defaultdict(list)
        self.elsewhere = {value.name for value in graph.output}.union(*map(_read_inside, graph.node))
        self.turned = {
            node.output[0] for node in graph.node if node.op_type == "Transpose" and node.input[0] in weights
        }
        for node in graph.node:
            for name in node.input:
                self.readers[name].append(node)

    def of_right_factors(self) -> dict[str, list[_Product]]:
        """By right factor all of its products."""
        by_weight = {name: list(self._products(name)) for name in self.weights}
        return {
            name: [each for each in products if each is not None]
            for name, products in by_weight.items()
            if products and None not in products
        }

    def _products(self, weight: str) -> Iterator[_Product | None]:
        """A product for each reader of a weight; None where one is no product, or one of another kind."""
        for reader in self.readers[weight]:
            turned = reader if reader.output[0] in self.turned else None
            value = weight if turned is None else turned.output[0]
            alone = not {weight, value} & self.elsewhere
            for node in self.readers[value] if turned is not None else [reader]:
                first = alone and self._multiplies(node) and node.input[1] == value and self._goes_on(node)
                by_rows = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
                yield _Product(node, turned, int(by_rows == (turned is not None))) if first else None

    def _goes_on(self, node: NodeProto) -> bool:
        """Whether a product has no bias and goes into products with other weights alone."""
        result = node.output[0]
        after = self.readers[result]
        on = all(self._multiplies(each) and each.input[0] == result for each in after)
        return bool(after) and on and result not in self.elsewhere and len(node.input) == 2

    def _multiplies(self, node: NodeProto) -> bool:
        """Whether a node multiplies a value by a stored matrix."""
        return node.op_type in _PRODUCTS and (node.input[1] in self.weights or node.input[1] in self.turned)


def _read_inside(node: NodeProto) -> set[str]:
    """What the graphs inside a node read."""
    inner = [graph for attribute in node.attribute for graph in (attribute.g, *attribute.graphs)]
    return {name for graph in inner for each in graph.node for name in (*each.input, *_read_inside(each))}


def _stacked(
    graph: GraphProto, weights: Sequence[TensorProto], products: Sequence[Sequence[_Product]]
) -> dict[str, list[NodeProto]]:
    """Store the stack of these weights in their place, and give the nodes that come instead of the products, by the
    first outputs of those.
    """
    from onnx import helper, numpy_helper

    axis, names = products[0][0].axis, [weight.name for weight in weights]
    name, sizes = _name(names), np.array([weight.dims[axis] for weight in weights])
    values = np.concatenate([numpy_helper.to_array(weight) for weight in weights], axis)
    for i in reversed(range(len(graph.initializer))):  # not `remove`, which compares whole weights
        if graph.initializer[i].name in names:
            del graph.initializer[i]
    graph.initializer.extend([numpy_helper.from_array(values, name), numpy_helper.from_array(sizes, f"{name}{_RANKS}")])
    new: dict[str, list[NodeProto]] = {}
    for number, together in enumerate(zip(*products, strict=True)):
        (x, _), kind = together[0].node.input, together[0].node.op_type
        results, result, weight = [each.node.output[0] for each in together], f"{name}_product_{number}", name
        made: list[NodeProto] = []
        if together[0].turned is not None:
            weight = f"{name}_turned_{number}"
            made.append(helper.make_node("Transpose", [name], [weight], name=weight, perm=[1, 0]))
        made.append(helper.make_node(kind, [x, weight], [result], name=result))
        made[-1].attribute.extend(together[0].node.attribute)
        made.append(helper.make_node("Split", [result, f"{name}{_RANKS}"], results, name=f"{result}_split", axis=-1))
        for node in (node for each in together for node in (each.turned, each.node) if node is not None):
            new[node.output[0]] = []
        new[results[0]] = made
    return new


def _name(names: Sequence[str]) -> str:
    """One name for several, as a shell would write them: what is the same once, the rest in braces."""
    parts = [name.split(".") for name in names]
    head = _same(parts)
    tail = _same([each[: head - 1 if head else None : -1] for each in parts])
    middle = ",".join(".".join(each[head : len(each) - tail]) for each in parts)
    return ".".join([*parts[0][:head], f"{{{middle}}}", *parts[0][len(parts[0]) - tail :]])


def _same(lists: Sequence[Sequence[str]]) -> int:
    """How many elements are the same at the beginning."""
    return sum(1 for _ in takewhile(lambda each: len(set(each)) == 1, zip(*lists, strict=False)))
