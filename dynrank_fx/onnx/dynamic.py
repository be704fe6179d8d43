"""Dimensions of an ONNX file that are free under a name the user gives: ``{"x": {0: "batch", 1: "length"}}``."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor, nn

from ..aliases import Kwargs
from ..errors import ExportError
from ..tracing import Inputs

if TYPE_CHECKING:
    from onnx import ModelProto

Dynamic: TypeAlias = Mapping[str, Mapping[int, str]]
"""By argument of the model, the name of each free dimension; the same name means the same size."""


def arguments(module: nn.Module, inputs: Inputs) -> Kwargs:
    """The inputs by the names of forward's parameters, in order."""
    args, kwargs = inputs
    return dict(inspect.signature(module.forward).bind(*args, **kwargs).arguments)


def named_shapes(module: nn.Module, inputs: Inputs, dynamic: Dynamic) -> dict[str, object]:
    """``dynamic_shapes`` for torch.export. Raises ExportError for an argument or a dimension that is not there."""
    if not isinstance(dynamic, Mapping) or not all(_is_named(axes) for axes in dynamic.values()):
        raise ExportError(f"dynamic is {dynamic!r}: name dimensions by argument, such as {{'x': {{0: 'batch'}}}}")
    given = arguments(module, inputs)
    for name, axes in dynamic.items():
        tensor = given.get(name)
        if not isinstance(tensor, Tensor):
            tensors = [key for key, value in given.items() if isinstance(value, Tensor)]
            raise ExportError(f"the model takes no tensor {name!r} to free a dimension of: its inputs are {tensors}")
        for axis in axes:
            if not 0 <= axis < tensor.ndim:
                raise ExportError(f"{name} has {tensor.ndim} dimensions, counted from 0, and none is number {axis}")
    dims = {name: torch.export.Dim(name) for axes in dynamic.values() for name in axes.values()}
    return {key: {axis: dims[dim] for axis, dim in dynamic.get(key, {}).items()} or None for key in given}


def _is_named(axes: object) -> bool:
    return isinstance(axes, Mapping) and all(
        isinstance(axis, int) and isinstance(name, str) for axis, name in axes.items()
    )


def name_dimensions_(model: ModelProto, dynamic: Dynamic) -> None:
    """Give the file's free dimensions the names; torch names them by numbers of its own."""
    names: dict[str, str] = {}
    for value in model.graph.input:
        for axis, name in dynamic.get(value.name, {}).items():
            dim = value.type.tensor_type.shape.dim[axis]
            if not dim.dim_param:
                raise ExportError(
                    f"the model fixes dimension {axis} of {value.name} at {dim.dim_value}: leave {name!r} out, or "
                    "change what depends on that size"
                )
            names[dim.dim_param] = name
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in names:
                dim.dim_param = names[dim.dim_param]


def with_sizes(module: nn.Module, inputs: Inputs, dynamic: Dynamic, sizes: Mapping[str, int]) -> Inputs:
    """The inputs with other sizes of the named dimensions: slices of the example over again."""
    given = arguments(module, inputs)
    for name, axes in dynamic.items():
        for axis, dim in axes.items():
            if dim in sizes:
                tensor = given[name]
                given[name] = tensor.index_select(
                    axis, torch.arange(sizes[dim], device=tensor.device) % tensor.shape[axis]
                )
    args, kwargs = inputs
    values = list(given.values())
    return tuple(values[: len(args)]), {key: given[key] for key in kwargs}


def sizes_of(module: nn.Module, inputs: Inputs, dynamic: Dynamic) -> dict[str, int]:
    """The sizes that the named dimensions have in these inputs."""
    given = arguments(module, inputs)
    return {dim: given[name].shape[axis] for name, axes in dynamic.items() for axis, dim in axes.items()}
