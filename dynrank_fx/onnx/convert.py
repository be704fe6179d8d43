"""From a module to an ONNX model whose weights are stored once, as they are, and whose dimensions are free, the batch
first, where the model leaves them free.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind, TensorArgument
from torch.utils import _pytree as pytree

from ..errors import ExportError, reason
from ..tracing import (
    DynamicShapes,
    Inputs,
    batch_size,
    double_batch_of_one,
    free_dimensions,
    joined,
    named_keywords,
    origin,
    quiet,
    slow_attention,
    tensors,
)
from .dynamic import free_axes, movable_axes, name_free_
from .stack import stack_rights_

if TYPE_CHECKING:
    import onnx_ir as ir
    from onnx import GraphProto, ModelProto

_FOLD_LIMIT = 1024  # elements of a constant worth computing ahead, such as a shape; onnxruntime folds the rest itself


class RestrictedError(ExportError):
    """torch.export does not free a dimension as it was asked to: the model takes some sizes of it alone, or one."""


def converted(
    module: nn.Module,
    inputs: Inputs,
    dynamic_shapes: DynamicShapes | None,
    opset: int | None,
    *,
    only_batch: bool = False,
    stacked: bool = True,
) -> tuple[ModelProto, bool]:
    """(ONNX model, whether its batch is free). Without ``dynamic_shapes`` every dimension is free, or the batch alone,
    where the model allows it, and has a name (see ``name_free_``); what it does not allow has the example's size.

    stacked: whether right factors that read one value become one weight, see ``stack_rights_``.
    """
    doubled = double_batch_of_one(*inputs)
    # Each says what is free of these inputs; the batch has to be, but in the last ones, of which the last one counts.
    first, last = [dynamic_shapes], [dynamic_shapes]
    if dynamic_shapes is None:
        first = [free_dimensions(*doubled, only_first=True)]
        axes = [] if only_batch else movable_axes(module, doubled)
        if any(axes):
            first, last = [free_axes(doubled, axes), *first], [free_axes(inputs, axes), None]
    for shapes in first:
        with contextlib.suppress(ExportError):  # then another attempt works, or says what is wrong
            model = _convert(module, doubled, shapes, opset, stacked)
            if _batch_is_free(model, doubled):
                name_free_(model, doubled)
                return model, True
    for shapes in last[:-1]:
        with contextlib.suppress(ExportError):
            model = _convert(module, inputs, shapes, opset, stacked)
            name_free_(model, inputs)
            return model, _batch_is_free(model, inputs)
    model = _convert(module, inputs, last[-1], opset, stacked)
    name_free_(model, inputs)
    return model, _batch_is_free(model, inputs)


def _convert(
    module: nn.Module, inputs: Inputs, dynamic_shapes: DynamicShapes | None, opset: int | None, stacked: bool
) -> ModelProto:
    kind = type(module).__name__
    with quiet(), torch.no_grad(), slow_attention(), named_keywords(module, inputs):
        try:
            shapes: Any = dynamic_shapes  # Any: its annotation forgets the ShapesCollection
            program = torch.export.export(module, *inputs, dynamic_shapes=shapes, strict=False)
        except Exception as error:  # torch.export runs forward, and fails in ways of its own
            fixed = re.search(r"Constraints violated \((.+)\)!", str(error))
            if "Cannot create Dim with inconsistent min" in str(error):  # of its own, where it words a suggestion
                raise ExportError(
                    "within the bounds of its Dim the model takes a single size of a dimension: widen the bounds, or "
                    "leave that dimension out of the free ones"
                ) from error
            if fixed is not None:
                which = re.sub(r"L\['(\w+)'\]\.size\(\)\[(\d+)\]", r"dimension \2 of \1", fixed[1])
                raise RestrictedError(
                    f"the model fixes or restricts {which}: leave that dimension out of the free ones, or change "
                    "what depends on it"
                ) from error
            where = f"{origin(error, module)} ({reason(error)})"
            raise ExportError(f"torch.export cannot trace {where}: change the model or its inputs") from error
        names = _names(program)
        try:
            model = _onnx_model(program, names, opset)
        except Exception as error:  # of torch.onnx, of onnxscript, or of onnx_ir
            why = reason(error)
            raise ExportError(f"torch.onnx cannot convert {kind} ({why}): use operations that ONNX has") from error
    # A dimension that torch.export found to be fixed comes as one *named* "2", which others would take for free.
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param.isdigit():
                dim.dim_value = int(dim.dim_param)
    refuse_inflated(model, (*program.state_dict.values(), *program.constants.values()))
    if stacked:
        stack_rights_(model)
    return model


def _onnx_model(program: ExportedProgram, names: Sequence[str], opset: int | None) -> ModelProto:
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass, NameFixPass
    from onnxscript.optimizer import optimize_ir

    # Not optimize=True: that stores a tied weight again, transposed.
    onnx_program = torch.onnx.export(program, dynamo=True, opset_version=opset, optimize=False, verbose=False)
    assert onnx_program is not None
    model, weights = onnx_program.model, set(program.state_dict)

    def should_fold(node: ir.Node) -> bool | None:
        return False if any(value is not None and value.name in weights for value in node.inputs) else None

    optimize_ir(model, should_fold=should_fold, output_size_limit=_FOLD_LIMIT)
    # Not before: an output that is an input would take its name away.
    for value, name in zip((*model.graph.inputs, *model.graph.outputs), names, strict=True):
        value.name = name
    NameFixPass()(model)
    ClearMetadataAndDocStringPass()(model)  # stack traces, with the paths of this machine
    proto = onnx_program.model_proto
    # An initializer says its shape itself; onnxruntime's quantiser transposes it, and then believes the other one.
    stored = {each.name for each in proto.graph.initializer}
    kept = [each for each in proto.graph.value_info if each.name not in stored]
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(kept)
    return proto


def _names(program: ExportedProgram) -> list[str]:
    """Names of the graph's inputs, after the arguments, and outputs, after their place: ``output_0``, ``logits``."""
    signature, spec = program.graph_signature, program.call_spec.out_spec
    assert spec is not None
    given = [item.arg for item in signature.input_specs if item.kind is InputKind.USER_INPUT]
    returned = [item.arg for item in signature.output_specs if item.kind is OutputKind.USER_OUTPUT]
    names = [arg.name for arg in given if isinstance(arg, TensorArgument)]
    places = pytree.tree_flatten_with_path(pytree.tree_unflatten(range(spec.num_leaves), spec))[0]
    for (path, _), arg in zip(places, returned, strict=True):
        if isinstance(arg, ConstantArgument) and arg.value is None:
            continue
        keyed = bool(path) and isinstance(path[0], pytree.MappingKey)
        name = joined(path) if keyed else "_".join(filter(None, ["output", joined(path)]))
        if not isinstance(arg, TensorArgument):
            raise ExportError(f"the model returns a plain number as {name}, which ONNX has not: return a tensor")
        while name in names:
            name += "_out"
        names.append(name)
    return names


def renamed(model: ModelProto, new: Callable[[str], str]) -> None:
    """Give every value of the graph, and of the graphs inside it, the name that ``new`` makes of its own."""

    def rename(graph: GraphProto) -> None:
        for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
            value.name = new(value.name)
        for node in graph.node:
            for names in (node.input, node.output):
                names[:] = [new(name) for name in names]
            for attribute in node.attribute:
                for inner in (attribute.g, *attribute.graphs):
                    if inner.node:
                        rename(inner)

    rename(model.graph)


def _batch_is_free(model: ModelProto, inputs: Inputs) -> bool:
    shared = [
        value.type.tensor_type.shape.dim[0]
        for value, tensor in zip(model.graph.input, tensors(inputs), strict=True)
        if tensor.ndim and tensor.shape[0] == batch_size(inputs)
    ]
    return bool(shared) and all(dim.dim_param for dim in shared)


def refuse_inflated(model: ModelProto, stored: Sequence[Tensor]) -> None:
    """More than the module stores can only be a table that forward makes, such as positions: no weight for the second
    time, and no product of factors that are gone.
    """
    from onnx.numpy_helper import to_array

    ours = list({tensor.data_ptr(): tensor for tensor in tensors(stored)}.values())
    of_module = sum(tensor.numel() for tensor in ours)
    in_file = sum(size for each in model.graph.initializer if (size := math.prod(each.dims)) > _FOLD_LIMIT)
    if in_file <= of_module:
        return
    written = Counter(_content(to_array(each)) for each in model.graph.initializer)
    contents = [_content(tensor.detach().cpu().float().numpy()) for tensor in ours]
    gone = any(not written[content] for content, tensor in zip(contents, ours, strict=True) if tensor.ndim >= 2)
    given = Counter(content for content in contents if content[0] > _FOLD_LIMIT)
    twice = any(written[content] > count for content, count in given.items())
    if gone or twice:
        raise ExportError(
            f"the ONNX graph would hold {in_file:,} weights where the module has {of_module:,}, as if a product of "
            "factors had been multiplied out or a weight stored twice: give another opset"
        )


def parameter_count(model: ModelProto) -> int:
    """Elements of the floating-point initializers: the integers are shapes and indices."""
    from onnx import TensorProto

    floating = (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16)
    return sum(math.prod(each.dims) for each in model.graph.initializer if each.data_type in floating)


def _content(array: np.ndarray) -> tuple[int, bytes]:
    """The number of values, and the values themselves, whatever their order: a transposed weight has the same."""
    values = np.sort(array.astype(np.float32), axis=None)
    return values.size, hashlib.sha256(values.tobytes()).digest()
