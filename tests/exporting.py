"""What the tests of ONNX files share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

CPU = "CPUExecutionProvider"


class Apply(nn.Module):
    """A function of layers and inputs as a module."""

    def __init__(self, function: Any, *layers: nn.Module) -> None:
        super().__init__()
        self.function, self.layers = function, nn.ModuleList(layers)

    def forward(self, *args: Any) -> Any:
        return self.function(*self.layers, *args)


def run(path: Path, **feeds: Tensor) -> list[Tensor]:
    """The outputs of a file, by onnxruntime itself."""
    opened = onnxruntime.InferenceSession(path, providers=[CPU])
    arrays = opened.run(None, {name: tensor.numpy() for name, tensor in feeds.items()})
    return [torch.from_numpy(np.asarray(array)) for array in arrays]


def dims(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of a file's weights, by name."""
    return {i.name: tuple(i.dims) for i in onnx.load(path).graph.initializer}


def graph_of(
    nodes: list[onnx.NodeProto], inputs: dict[str, Any], outputs: dict[str, Any], weights: dict[str, np.ndarray]
) -> onnx.ModelProto:
    """A model by hand. inputs, outputs: (type, shape) by name."""
    values = [
        [onnx.helper.make_tensor_value_info(name, *each) for name, each in some.items()] for some in (inputs, outputs)
    ]
    stored = [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()]
    made = onnx.helper.make_graph(nodes, "by hand", *values, stored)
    return onnx.helper.make_model(made, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
