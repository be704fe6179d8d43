"""ONNX models of one weight's ops alone, dense and factored, to be timed: what a site costs where it is to run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import DTypeLike

from ..onnx import Feeds
from ..ops import ConvOp, ConvTransposeOp, EinsumOp, EmbeddingOp, LinearOp, MatmulOp, Op, ProductOp, Shape
from ..plan import PlannedSite

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto

_OPSET = 18

Setting: TypeAlias = int | str | Sequence[int]
"""The value of an attribute of a node."""


@dataclass
class _Graph:
    """Nodes, weights and outputs as they come. element: the type of the numbers, of NumPy."""

    element: DTypeLike
    nodes: list[NodeProto] = field(default_factory=list)
    weights: list[TensorProto] = field(default_factory=list)
    outputs: list[tuple[str, Shape]] = field(default_factory=list)

    def weight(self, shape: Shape) -> str:
        from onnx import numpy_helper

        name = f"w{len(self.weights)}"
        values = np.random.default_rng(len(self.weights)).standard_normal(shape) / math.sqrt(max(shape[-1], 1))
        self.weights.append(numpy_helper.from_array(values.astype(self.element), name))
        return name

    def node(self, kind: str, inputs: Sequence[str], **attributes: Setting) -> str:
        from onnx import helper

        name = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))  # type: ignore[arg-type]
        return name


def site_model(rows: Sequence[PlannedSite], rank: int | None, element: DTypeLike) -> tuple[ModelProto, Feeds] | None:
    """(ONNX model, what to feed it) of all uses of a site, or of the sites that share a factor; rank: None for dense.

    element: NumPy's type of the numbers. None where the shapes of the inputs are not known, or an op cannot be put so.
    """
    from onnx import helper

    graph, feeds = _Graph(element), Feeds()
    shared = len(rows) > 1
    stem: str | None = None
    for row in rows:
        for use in row.site.uses:
            x = use.input_shape
            if x is None or not _known(use.op):
                return None
            if not (shared and feeds):
                feeds[f"x{len(feeds)}"] = _values(use.op, x, row.site.shape, element)
            value = f"x{len(feeds) - 1}"
            if rank is None:
                value, x = _apply(graph, use.op, value, x, row.site.shape)
            else:
                shapes = row.layout.factor_shapes(row.site.shape, rank)
                for number, (stage, index) in enumerate(row.layout.stages(use.op, rank)):
                    if shared and not row.site.by_code and number == 0 and stem is not None:
                        value, x = stem, stage.output_shape(x, shapes[index])
                        continue
                    value, x = _apply(graph, stage, value, x, shapes[index])
                    stem = value if number == 0 else stem
            graph.outputs.append((value, x))
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(element))
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in feeds.items()
    ]
    outputs = [helper.make_tensor_value_info(name, kind, shape) for name, shape in graph.outputs]
    made = helper.make_graph(graph.nodes, "site", inputs, outputs, graph.weights)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=9)
    return model, feeds


def _known(op: Op) -> bool:
    return not (isinstance(op, ProductOp) and op.view.gathered)


def _values(op: Op, x: Shape, weight: Shape, element: DTypeLike) -> np.ndarray:
    generator = np.random.default_rng(0)
    if isinstance(op, EmbeddingOp):
        return generator.integers(0, op.view.shape(weight)[0], x)
    return generator.standard_normal(x).astype(element)


def _apply(graph: _Graph, op: Op, x: str, x_shape: Shape, weight: Shape) -> tuple[str, Shape]:
    """The nodes of an op on a weight of this shape, and the shape of what it gives."""
    out = op.output_shape(x_shape, weight)
    if isinstance(op, ConvOp | ConvTransposeOp):
        return _convolution(graph, op, x, weight), out
    if isinstance(op, EinsumOp):
        first, second = (graph.weight(weight), x) if op.weight_first else (x, graph.weight(weight))
        left, right = (op.weight, op.x) if op.weight_first else (op.x, op.weight)
        return graph.node("Einsum", [first, second], equation=f"{left},{right}->{op.out}"), out
    assert isinstance(op, ProductOp)
    shape = op.view.shape(weight)
    if isinstance(op, EmbeddingOp):
        return graph.node("Gather", [graph.weight(shape), x]), out
    if isinstance(op, LinearOp):
        return graph.node("MatMul", [x, graph.weight((*shape[:-2], shape[-1], shape[-2]))]), out
    assert isinstance(op, MatmulOp)
    W = graph.weight(shape)
    return graph.node("MatMul", [W, x] if op.weight_first else [x, W]), out


def _convolution(graph: _Graph, op: ConvOp | ConvTransposeOp, x: str, weight: Shape) -> str:
    attributes: dict[str, Setting] = {"kernel_shape": weight[2:], "strides": op.stride, "dilations": op.dilation}
    attributes["group"] = op.groups
    if isinstance(op, ConvTransposeOp):
        attributes |= {"output_padding": op.output_padding, "pads": (*op.padding, *op.padding)}
    elif isinstance(op.padding, str):
        attributes["auto_pad"] = "SAME_UPPER" if op.padding == "same" else "VALID"
    else:
        low, high = list(op.padding), list(op.padding)
        for i in range(len(op.stride)):  # F.pad counts axes from the last; how the margin is filled costs little
            if op.pad:
                low[i] += op.pad[2 * (len(op.stride) - 1 - i)]
                high[i] += op.pad[2 * (len(op.stride) - 1 - i) + 1]
        attributes["pads"] = (*low, *high)
    kind = "ConvTranspose" if isinstance(op, ConvTransposeOp) else "Conv"
    return graph.node(kind, [x, graph.weight(weight)], **attributes)
