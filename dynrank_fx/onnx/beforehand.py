"""What would stop an export, found out before the work that comes before it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from ..errors import ExportError, reason
from ..text import counted
from ..tracing import (
    ExampleInputs,
    as_dicts,
    evaluating,
    fresh,
    in_order,
    same_buffers,
    slow_attention,
    split_inputs,
    tensors,
)
from .dynamic import Dynamic, named_shapes
from .precision import Precision
from .session import Provider, session_of

_ROOM = {Precision.INT8_WEIGHTS: 0.25, Precision.FLOAT16: 0.5, Precision.BFLOAT16: 0.5}  # of a weight in float32


def check_precision(precision: Precision, provider: Provider | None) -> None:
    """Raise ExportError for a provider that cannot multiply matrices of this type, as onnxruntime's CPU bfloat16.

    provider: None for the CPU's where there is no GPU.
    """
    from onnx import TensorProto, helper

    if precision is not Precision.BFLOAT16 or (provider is None and torch.cuda.is_available()):
        return
    provider = provider or "CPUExecutionProvider"
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 2]) for name in "xy")
    nodes = [
        helper.make_node("Cast", ["x"], ["a"], to=TensorProto.BFLOAT16),
        helper.make_node("MatMul", ["a", "a"], ["b"]),
        helper.make_node("Cast", ["b"], ["y"], to=TensorProto.FLOAT),
    ]
    graph = helper.make_graph(nodes, "product", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    try:
        session_of(model.SerializeToString(), provider)
    except ExportError as error:
        name = provider if isinstance(provider, str) else provider[0]
        raise ExportError(
            f"{name} has no product of matrices in {precision.value}: export in float32 or float16, or name a provider "
            "that has it"
        ) from error


def check_names(
    module: nn.Module,
    example_inputs: ExampleInputs,
    input_names: Sequence[str] = (),
    output_names: Sequence[str] = (),
    dynamic: Dynamic | None = None,
) -> None:
    """Raise ExportError for names that are not as many as the model's tensors, or of arguments that it has not.

    The model runs once, where its outputs have to be counted.
    """
    inputs = in_order(module, as_dicts(split_inputs(example_inputs)))
    if dynamic is not None:
        named_shapes(module, inputs, dynamic)
    if input_names:
        _check_count("input", input_names, len(tensors(inputs)))
    if output_names:
        args, kwargs = fresh(inputs)
        with torch.no_grad(), slow_attention(), evaluating(module), same_buffers(module):
            try:
                outputs = module(*args, **kwargs)
            except Exception as error:  # of the user's forward
                raise ExportError(
                    f"the model fails on its example inputs ({reason(error)}): mend one of them"
                ) from error
        _check_count("output", output_names, len(tensors(outputs)))


def _check_count(what: str, names: Sequence[str], count: int) -> None:
    if len(names) != count or len(set(names)) < len(names) or not all(names):
        raise ExportError(
            f"the model has {counted(count, what)} and these are names of {len(names)} ({', '.join(names)}): give as "
            f"many {what} names, each once"
        )


def check_room(path: Path, module: nn.Module, precision: Precision = Precision.FLOAT32) -> None:
    """Raise ExportError where the disk of a file to come has no room for the module's weights."""
    share = _ROOM.get(precision, 1.0)
    needed = share * sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise ExportError(
            f"{path} may take {needed / 1e6:,.2f} MB and its disk has {free / 1e6:,.2f} MB left: make room, or choose "
            "another place"
        )
