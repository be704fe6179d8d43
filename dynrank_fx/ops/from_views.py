"""What a graph does to a weight before it multiplies by it: transposing it, or taking a part of it."""

from __future__ import annotations

import operator
import sys
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import fx

from .view import Shape, View

Given: TypeAlias = Any
"""What a call in a graph is given. torch has one union for all that can stand there, ``fx.node.Argument``; which of it
does is said by the function that is called.
"""

_aten = torch.ops.aten

_SWAPS = {torch.t, "t", _aten.t.default, _aten.numpy_T.default, _aten.mT.default}
_TRANSPOSES = {torch.transpose, "transpose", torch.swapaxes, "swapaxes", _aten.transpose.int, _aten.swapaxes.default}
_PERMUTES = {torch.permute, "permute", _aten.permute.default}
_SPLITS = {torch.split, "split", _aten.split.Tensor, _aten.split_with_sizes.default, _aten.split.sizes}
_CHUNKS = {torch.chunk, "chunk", _aten.chunk.default}
_CASTS = {"to", _aten.to.dtype}
_NARROWS = {torch.narrow, "narrow", _aten.narrow.default}
_SELECTS = {torch.select, "select", _aten.select.int}
# What asks only how the weight looks, or checks that.
_METADATA = {"dtype", "device", "shape", "ndim", "is_cuda", "itemsize", "nbytes", "is_meta", "layout"}
_METADATA_CALLS = {
    *("size", "dim", "ndimension", "numel", "nelement", "is_floating_point", "type", "element_size", "get_device"),
    *(torch.numel, torch.is_floating_point, _aten._assert_tensor_metadata.default, _aten.sym_size.int),
}


def reads_metadata(user: fx.Node) -> bool:
    """Whether the node reads only the dtype, device or shape of the weight."""
    if user.target is getattr:
        return user.args[1] in _METADATA
    if user.target == "type":
        return len(user.args) == 1
    return user.op in ("call_function", "call_method") and user.target in _METADATA_CALLS


def is_metadata(function: object) -> bool:
    """Whether a function, or the getter of a property, gives only the dtype, device or shape of a tensor."""
    name = getattr(function, "__name__", "")
    if name == "__get__":
        return getattr(getattr(function, "__self__", None), "__name__", "") in _METADATA
    return name in _METADATA_CALLS


def parts_of(user: fx.Node, view: View, weight: Shape) -> list[tuple[fx.Node, View]] | None:
    """The nodes that give a part of the weight where ``user`` takes one, each with its view of the whole weight.

    view: what the node that ``user`` reads gives. None where ``user`` does something else. A part of an axis before
    the last two (other than one matrix of a stack) is something else too.
    """
    if user.op not in ("call_function", "call_method"):
        return None
    if user.target is _aten.alias.default:
        return [(user, view)]
    if gather_index(user) is not None and len(view.shape(weight)) == 3 and not view.gathered and view.index is None:
        return [(user, replace(view, gathered=True))]
    if user.target in _CASTS and len(user.args) == 2 and isinstance(user.args[1], torch.dtype) and not user.kwargs:
        name = str(user.args[1]).removeprefix("torch.")
        return [(user, replace(view, dtype=name))] if user.args[1].is_floating_point and view.dtype is None else None
    shape = view.shape(weight)
    if _swaps(user, len(shape)):
        return [(user, replace(view, transposed=not view.transposed))]
    if user.target in _SPLITS | _CHUNKS:
        return _split(user, view, shape)
    if user.target in _SELECTS or user.target is operator.getitem or user.target is _aten.slice.Tensor:
        parts = _getitem(user, view, shape)
    elif user.target in _NARROWS:
        parts = _narrow(user, view, shape)
    else:
        return None
    return None if parts is None else [(user, parts)]


def gather_index(user: fx.Node) -> fx.Node | None:
    """The node by which ``user`` indexes the first axis of what it reads; None where it does something else."""
    if user.target is operator.getitem:
        index = user.args[1]
    elif user.target is _aten.index.Tensor and isinstance(user.args[1], list | tuple) and len(user.args[1]) == 1:
        index = user.args[1][0]
    else:
        return None
    return index if isinstance(index, fx.Node) else None


def _swaps(user: fx.Node, ndim: int) -> bool:
    last = {ndim - 2, ndim - 1}
    if user.target is getattr:
        return user.args[1] == "mT" or (user.args[1] == "T" and ndim == 2)
    given = _given(user, "dim0", "dim1", "axis0", "axis1", "dims")
    if user.target in _SWAPS:
        return ndim == 2 or user.target is _aten.mT.default
    if user.target in _TRANSPOSES:
        return _whole(*given) and {axis % ndim for axis in given} == last
    if user.target in _PERMUTES:
        axes = given[0] if len(given) == 1 and isinstance(given[0], list | tuple) else given
        return _whole(*axes) and [axis % ndim for axis in axes] == [*range(ndim - 2), ndim - 1, ndim - 2]
    return False


def _given(user: fx.Node, *names: str) -> list[Given]:
    """What the call is given beside the weight, by position or by one of these names, which are in that order."""
    return [*user.args[1:], *(user.kwargs[name] for name in names if name in user.kwargs)]


def _whole(*values: object) -> bool:
    return all(isinstance(value, int) for value in values)


def _split(user: fx.Node, view: View, shape: Shape) -> list[tuple[fx.Node, View]] | None:
    given = _given(user, "split_size_or_sections", "split_size", "split_sizes", "chunks", "dim")
    size, axis = given[0], (given[1] if len(given) > 1 else 0)
    if not _whole(axis) or not (_whole(size) or (isinstance(size, list | tuple) and _whole(*size))):
        return None
    if _each_examples(view, shape, axis):
        return None
    total = shape[axis]
    if user.target in _CHUNKS:
        size = -(-total // size)
    sizes = [min(size, total - start) for start in range(0, total, size)] if isinstance(size, int) else list(size)
    parts = []
    for part in user.users:
        (index,) = _given(part) if part.target is operator.getitem else (None,)
        if not _whole(index):
            return None
        assert isinstance(index, int)
        index %= len(sizes)
        start = sum(sizes[:index])
        ranges = _ranges(view, shape, {axis: (start, start + sizes[index])})
        if ranges is None:
            return None
        parts.append((part, ranges))
    return parts


def _getitem(user: fx.Node, view: View, shape: Shape) -> View | None:
    """The view of ``w[key]``, with whole numbers and slices in the key."""
    if user.target is operator.getitem:
        (key,) = _given(user)
        keys: Given = key if isinstance(key, tuple) else (key,)
    else:
        axis, *rest = _given(user, "dim", "start", "index", "end", "step")
        if not _whole(axis):
            return None
        keys = [slice(None)] * (axis % len(shape)) + [rest[0] if user.target in _SELECTS else slice(*rest)]
    if keys and _each_examples(view, shape, 0) and not _takes_all(keys[0]):
        return None
    if keys and isinstance(keys[0], int) and len(shape) == 3 and view.index is None:
        view, keys, shape = replace(view, index=keys[0] % shape[0]), keys[1:], shape[1:]
    if len(keys) > len(shape) or not all(isinstance(part, slice) for part in keys):
        return None
    ranges = {}
    for axis, part in enumerate(keys):
        if not all(bound is None or isinstance(bound, int) for bound in (part.start, part.stop, part.step)):
            return None
        start, stop, step = part.indices(shape[axis])
        if step != 1 or stop <= start:
            return None
        ranges[axis] = (start, stop)
    return _ranges(view, shape, ranges)


def _narrow(user: fx.Node, view: View, shape: Shape) -> View | None:
    given = _given(user, "dim", "start", "length")
    if not _whole(*given) or _each_examples(view, shape, given[0]):
        return None
    axis, start, length = given
    start %= shape[axis]
    return _ranges(view, shape, {axis: (start, start + length)})


def _each_examples(view: View, shape: Shape, axis: int) -> bool:
    """Whether the axis is that of gathered matrices, which is as long as the index says, and not as the stack."""
    return view.gathered and axis % len(shape) == 0


def _takes_all(key: Given) -> bool:
    """Whether this part of a key takes the whole axis, however long that is."""
    if not isinstance(key, slice):
        return False
    to_the_end = key.stop is None or (isinstance(key.stop, int) and key.stop >= sys.maxsize)
    return key.start in (None, 0) and to_the_end and key.step in (None, 1)


def _ranges(view: View, shape: Shape, ranges: dict[int, tuple[int, int]]) -> View | None:
    """The view with these ranges taken of what it shows; None where an axis before the last two would be cut."""
    for axis, (start, stop) in ranges.items():
        if (start, stop) == (0, shape[axis]):
            continue
        place = axis % len(shape) - len(shape)
        if place < -2:
            return None
        name = "rows" if (place == -2) != view.transposed else "columns"
        before = getattr(view, name)
        offset = 0 if before is None else before[0]
        view = replace(view, **{name: (offset + start, offset + stop)})  # type: ignore[arg-type]
    return view
