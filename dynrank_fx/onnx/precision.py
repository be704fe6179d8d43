"""The types that a file's numbers are stored and multiplied in."""

from __future__ import annotations

import inspect
from enum import Enum
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..aliases import Output
from ..errors import ExportError
from ..tracing import shell

if TYPE_CHECKING:
    from onnx import ModelProto

_LEAST = 1024  # numbers of a weight that is worth storing in int8
_CONSUMERS = {"Conv", "ConvTranspose", "Gemm", "MatMul", "Gather", "Transpose", "Einsum"}


class Precision(Enum):
    """FLOAT16 and BFLOAT16: weights and everything between inputs and outputs, which stay float32. INT8_WEIGHTS:
    weights alone, one scale per row or output channel, multiplied in float32: a smaller file, not a faster one.
    """

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    INT8_WEIGHTS = "int8"

    @property
    def tolerance(self) -> float | None:
        """The largest error by default, as a share of the largest output: some tens of roundings; None as usual."""
        return {Precision.FLOAT16: 2e-2, Precision.BFLOAT16: 1e-1, Precision.INT8_WEIGHTS: 5e-2}.get(self)


class Casting(nn.Module):
    """A module in another type, between inputs and outputs that keep theirs, under the names of its own arguments."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.module = module.to(dtype)

        def forward(*args: object, **kwargs: object) -> Output:
            args, kwargs = pytree.tree_map_only(
                Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, (args, kwargs)
            )
            output = self.module(*args, **kwargs)
            return pytree.tree_map_only(Tensor, lambda t: t.float() if t.dtype == dtype else t, output)

        forward.__signature__ = inspect.signature(module.forward)  # type: ignore[attr-defined]
        self.forward = forward


def cast(module: nn.Module, precision: Precision) -> nn.Module:
    """The module as it is exported: a copy in the type, or itself. Raises ExportError where weights overflow."""
    if precision not in (Precision.FLOAT16, Precision.BFLOAT16):
        return module
    made = Casting(shell(module), torch.float16 if precision is Precision.FLOAT16 else torch.bfloat16)
    for (name, before), after in zip(module.named_parameters(), made.module.parameters(), strict=True):
        if bool(before.isfinite().all()) and not bool(after.isfinite().all()):
            raise ExportError(f"{name} has values that {precision.value} cannot hold: export in bfloat16 or float32")
    return made


def int8_weights_(model: ModelProto) -> None:
    """Store the weights of products, convolutions and look-ups as int8 with a scale per index of their first axis.

    q = round(W / s), s = max |W| / 127 over each index; a DequantizeLinear gives the file its float32 weight back.
    """
    from onnx import TensorProto, helper, numpy_helper

    graph = model.graph
    readers: dict[str, set[str]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, set()).add(node.op_type)
    kept, nodes = [], []
    for each in graph.initializer:
        size = int(np.prod(each.dims))
        fits = each.data_type == TensorProto.FLOAT and len(each.dims) > 1 and size >= _LEAST
        if not fits or not readers.get(each.name, set()) & _CONSUMERS:
            kept.append(each)
            continue
        W = numpy_helper.to_array(each)
        scale = np.abs(W).reshape(len(W), -1).max(1) / 127
        scale = np.where(scale > 0, scale, 1).astype(np.float32)
        column = scale.reshape(-1, *[1] * (W.ndim - 1))
        q = np.clip(np.rint(W / column), -127, 127).astype(np.int8)
        kept += [numpy_helper.from_array(q, f"{each.name}_int8"), numpy_helper.from_array(scale, f"{each.name}_scale")]
        inputs = [f"{each.name}_int8", f"{each.name}_scale"]
        nodes.append(helper.make_node("DequantizeLinear", inputs, [each.name], name=f"{each.name}_values", axis=0))
    before = list(graph.node)
    del graph.initializer[:], graph.node[:]
    graph.initializer.extend(kept)
    graph.node.extend([*nodes, *before])
