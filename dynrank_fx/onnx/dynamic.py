"""Dimensions of an ONNX file that are free under a name, the user's (``{"x": {0: "batch", 1: "length"}}``) or ours."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..aliases import Kwargs
from ..errors import ExportError
from ..tracing import (
    Inputs,
    arguments,
    as_dicts,
    batch_size,
    fresh,
    joined,
    leaves_with_paths,
    mapped,
    quiet,
    same_buffers,
)
from ..tracing import tensors as leaves_of

if TYPE_CHECKING:
    from onnx import ModelProto

Dynamic: TypeAlias = Mapping[str, Mapping[int, str]]
"""By argument of the model, the name of each free dimension; the same name means the same size."""

Shape: TypeAlias = tuple[int | str, ...]
"""The sizes of an input of a file, the free ones by name."""


def names_of_tensors(module: nn.Module, inputs: Inputs) -> list[str]:
    """What each tensor of the inputs is called, in their order: ``batch_ids`` for ``batch["ids"]``."""
    args, kwargs = inputs
    given = {**inspect.signature(module.forward).bind_partial(*args).arguments, **kwargs}
    return [joined(path) for path, leaf in leaves_with_paths(given) if isinstance(leaf, Tensor)]


def named_shapes(module: nn.Module, inputs: Inputs, dynamic: Dynamic) -> dict[str, object]:
    """``dynamic_shapes`` for torch.export that free these dimensions, as far as the model does.

    They have no names there: torch.export refuses a named one that the model restricts, such as to multiples of 4.
    Raises ExportError for an argument or a dimension that is not there.
    """
    if not isinstance(dynamic, Mapping) or not all(_is_named(axes) for axes in dynamic.values()):
        raise ExportError(f"dynamic is {dynamic!r}: name dimensions by argument, such as {{'x': {{0: 'batch'}}}}")
    tensors = dict(zip(names_of_tensors(module, inputs), leaves_of(inputs), strict=True))
    for name, axes in dynamic.items():
        if name not in tensors:
            raise ExportError(
                f"the model takes no tensor {name!r} to free a dimension of: its inputs are {list(tensors)}"
            )
        for axis in axes:
            if not 0 <= axis < tensors[name].ndim:
                raise ExportError(
                    f"{name} has {tensors[name].ndim} dimensions, counted from 0, and none is number {axis}"
                )

    def free(path: Sequence[object], leaf: object) -> object:
        axes = dynamic.get(joined(path), {}) if isinstance(leaf, Tensor) else {}
        return dict.fromkeys(axes, torch.export.Dim.AUTO) or None

    shapes: dict[str, object] = pytree.tree_map_with_path(free, as_dicts(arguments(module, inputs)))
    return shapes


def names_of_dims(module: nn.Module, inputs: Inputs, shapes: Kwargs) -> dict[str, dict[int, str]]:
    """The names that a ``torch.export.Dim`` gives to dimensions, by tensor. shapes: see ``shapes_by_argument``."""
    names: dict[str, dict[int, str]] = {}
    for path, leaf in leaves_with_paths(arguments(module, inputs)):
        axes: object = shapes
        for key in path:
            axes = dict(_entries(axes)).get(astuple(key)[0])
        dims = {axis: dim.__name__ for axis, dim in _entries(axes) if isinstance(dim, torch.export.Dim)}
        if dims and isinstance(leaf, Tensor):
            names[joined(path)] = dims
    return names


def _entries(shapes: object) -> Iterable[tuple[Any, object]]:  # Any: keys of a mapping
    """What is in one level of dynamic shapes, by key or place."""
    if isinstance(shapes, Mapping):
        return shapes.items()
    return enumerate(shapes) if isinstance(shapes, tuple | list) else ()


def without_names(shapes: Kwargs) -> Kwargs:
    """The same shapes, each ``torch.export.Dim`` free within its bounds as far as the model leaves it free."""

    def free(dim: object) -> object:
        return torch.export.Dim.AUTO(**_given(dim)) if isinstance(dim, torch.export.Dim) else dim

    automatic: Kwargs = pytree.tree_map(free, shapes)
    return automatic


def bounds_in(shapes: object) -> dict[str, range]:
    """By the name of a ``torch.export.Dim``, the sizes that its bounds allow."""
    dims = [dim for dim in pytree.tree_leaves(shapes) if isinstance(dim, torch.export.Dim)]
    return {dim.__name__: range(_given(dim).get("min", 0), _given(dim).get("max", sys.maxsize - 1) + 1) for dim in dims}


def _given(dim: torch.export.Dim) -> dict[str, int]:
    """Its bounds, without those that torch puts where none was given: 0 and an infinity of its own."""
    bounds = {name: getattr(dim, name) for name in ("min", "max")}
    return {name: bound for name, bound in bounds.items() if isinstance(bound, int) and bound > 0}


def _is_named(axes: object) -> bool:
    return isinstance(axes, Mapping) and all(
        isinstance(axis, int) and isinstance(name, str) for axis, name in axes.items()
    )


def name_dimensions_(model: ModelProto, dynamic: Dynamic, tensors: Sequence[str]) -> None:
    """Give the file's free dimensions the names; torch names them by numbers of its own. tensors: see
    ``names_of_tensors``; the file may call them otherwise.
    """
    names: dict[str, str] = {}
    for value, tensor in zip(model.graph.input, tensors, strict=True):
        for axis, name in dynamic.get(tensor, {}).items():
            dim = value.type.tensor_type.shape.dim[axis]
            if not dim.dim_param:
                raise ExportError(
                    f"the model fixes dimension {axis} of {tensor} at {dim.dim_value}: leave {name!r} out, or "
                    "change what depends on that size (an example of size 1 counts as one that depends on it)"
                )
            names[dim.dim_param] = name
    free = {dim.dim_param for value in model.graph.input for dim in value.type.tensor_type.shape.dim}
    others = (free - names.keys()) & set(names.values())
    _rename_(model, names | {name: f"other_{name}" for name in others})


_OF_TORCH = re.compile(r"s\d+")  # the name that torch.export gives to a size without one
_AXES = {1: ("length",), 2: ("height", "width"), 3: ("depth", "height", "width")}
"""What the last axes are called, behind batch and channels, by how many there are."""


def name_free_(model: ModelProto, inputs: Inputs) -> None:
    """Names for the free dimensions of a model by what they most likely are, the same wherever the size is the same.

    The first is the ``batch`` of every input that shares it. Then ``sequence`` is axis 1 of [batch, sequence] and of
    [batch, sequence, features]; ``height`` and ``width`` are the last ones of images. A dimension of the same kind that
    the model does not tie to the first has the input's name before it.
    """
    names: dict[str, str] = {}
    for value, tensor in zip(model.graph.input, leaves_of(inputs), strict=True):
        dims = value.type.tensor_type.shape.dim
        for axis, dim in enumerate(dims):
            if dim.dim_param in names or not _OF_TORCH.fullmatch(dim.dim_param):
                continue
            if axis == 0:
                names[dim.dim_param] = "batch" if tensor.shape[0] == batch_size(inputs) else f"{value.name}_rows"
                continue
            kind = "sequence"
            if axis > 1:
                behind = _AXES.get(len(dims) - 2, ())
                kind = behind[axis - 2] if behind else f"axis_{axis}"
            elif len(dims) > 3:
                kind = "channels"
            names[dim.dim_param] = kind if kind not in names.values() else f"{value.name}_{kind}"
    _rename_(model, names)


def _rename_(model: ModelProto, names: Mapping[str, str]) -> None:
    """Other names for the dimensions, also within what is computed of them, such as ``(s0 + 1)//2``."""
    symbols = re.compile(r"\b(" + "|".join(map(re.escape, names)) + r")\b") if names else None
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in names:
                dim.dim_param = names[dim.dim_param]
            elif dim.dim_param and symbols is not None:
                dim.dim_param = symbols.sub(lambda found: names[found[0]], dim.dim_param)


def shapes_in(model: ModelProto) -> dict[str, Shape]:
    """By input of a file its sizes, the free ones by name."""
    return {
        value.name: tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim)
        for value in model.graph.input
    }


def sizes_in(shapes: Iterable[Shape], inputs: Inputs) -> dict[str, int]:
    """The sizes of the free dimensions in these inputs, by name. shapes: see ``shapes_in``."""
    return {
        name: tensor.shape[axis]
        for shape, tensor in zip(shapes, leaves_of(inputs), strict=True)
        for axis, name in enumerate(shape)
        if isinstance(name, str)
    }


def with_sizes(shapes: Iterable[Shape], inputs: Inputs, sizes: Mapping[str, int]) -> Inputs:
    """The inputs with other sizes of these free dimensions: slices of the example over again."""
    axes = iter(shapes)

    def resized(leaf: Tensor) -> Tensor:
        for axis, name in enumerate(next(axes)):
            if name in sizes:
                places = torch.arange(sizes[name], device=leaf.device) % leaf.shape[axis]  # type: ignore[index]
                leaf = leaf.index_select(axis, places)
        return leaf

    return mapped(resized, inputs)


def movable_axes(module: nn.Module, inputs: Inputs) -> list[set[int]]:
    """By tensor the axes behind the first one that may have another size: the module runs with it.

    Axes of one size are moved together, since a model may tie them, as those of ids and their mask; then those of them
    at one place; then each by itself. torch.export alone would not tell: it calls a size free as long as one of two
    could have another value, as of a picture that is flattened.
    """
    shapes = [tensor.shape for tensor in leaves_of(inputs)]
    axes = [(n, axis) for n, shape in enumerate(shapes) for axis in range(1, len(shape)) if shape[axis] > 1]
    movable: list[set[int]] = [set() for _ in shapes]

    def moves(group: Sequence[tuple[int, int]]) -> bool:
        named = [tuple("moved" if (n, axis) in group else axis for axis in range(len(s))) for n, s in enumerate(shapes)]
        return other_sizes(module, named, inputs)["moved"] is not None

    for size in dict.fromkeys(shapes[n][axis] for n, axis in axes):
        alike = [(n, axis) for n, axis in axes if shapes[n][axis] == size]
        by_place = [[each for each in alike if each[1] == axis] for axis in dict.fromkeys(axis for _, axis in alike)]
        groups = [alike] if moves(alike) else [g for g in by_place if g != alike and moves(g)]
        moved = [each for group in groups for each in group]
        moved += [each for each in alike if each not in moved and [each] not in (alike, *by_place) and moves([each])]
        for n, axis in moved:
            movable[n].add(axis)
    return movable


def free_axes(inputs: Inputs, axes: Sequence[set[int]]) -> torch.export.ShapesCollection:
    """``dynamic_shapes`` for torch.export that free the first axis of every tensor and these, where the model does."""
    shapes = torch.export.ShapesCollection()
    for tensor, free in zip(leaves_of(inputs), axes, strict=True):
        if tensor.ndim:
            shapes[tensor] = dict.fromkeys((0, *sorted(free)), torch.export.Dim.AUTO)
    return shapes


def other_sizes(
    module: nn.Module, shapes: Sequence[Shape], inputs: Inputs, bounds: Mapping[str, range] | None = None
) -> dict[str, int | None]:
    """By free dimension, another size than the example's that the module takes: the next, the double (of what has to be
    a multiple), or a smaller one; None where it takes none of them. bounds: of some dimensions, the sizes to try.
    """
    found: dict[str, int | None] = {}
    for name, size in sizes_in(shapes, inputs).items():
        allowed = (bounds or {}).get(name, range(1, sys.maxsize))
        tries = [other for other in (size + 1, 2 * size, size - 1, size // 2) if other > 0 and other in allowed]
        found[name] = next((n for n in tries if takes(module, with_sizes(shapes, inputs, {name: n}))), None)
    return found


def takes(module: nn.Module, inputs: Inputs) -> bool:
    """Whether the module runs on these inputs."""
    args, kwargs = fresh(inputs)
    try:
        with quiet(), torch.no_grad(), same_buffers(module):
            module(*args, **kwargs)
    except Exception:  # of the user's forward; what it takes is all that is asked
        return False
    return True
