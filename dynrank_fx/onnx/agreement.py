"""Whether an ONNX file computes what its PyTorch model does, and how near is near enough."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..checks import is_list, is_number, is_whole
from ..errors import ExportError, reason
from ..text import counted
from ..tracing import (
    Inputs,
    batch_size,
    joined,
    leaves,
    leaves_with_paths,
    same_buffers,
    same_values,
    slow_attention,
    tensors,
)
from .session import Feeds, Session

# The largest error as a share of the output's largest value, by the coarsest type that takes part: about a thousand
# roundings of float32 and ten of float16. What differs by more was computed in another way.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_TF32 = 5e-3  # float32 on CUDA: both sides may multiply with float16's ten bits


@dataclass(frozen=True)
class Agreement:
    """How far one output on one batch is from PyTorch's.

    Attributes:
        batch: The size of the batch.
        output: The name of the output in the file.
        max_abs: The largest error.
        max_rel: The largest error as a share of the largest value that PyTorch gives.
    """

    batch: int
    output: str
    max_abs: float
    max_rel: float


def check_batch_sizes(batch_sizes: Sequence[int]) -> None:
    """Raise ExportError where there is no batch size to compare on, or one below 1."""
    sizes = list(batch_sizes) if is_list(batch_sizes) else batch_sizes
    if not sizes or not isinstance(sizes, list) or not all(is_whole(size, 1) for size in sizes):
        raise ExportError(f"batch sizes {sizes!r} leave nothing to compare: give one or more, each 1 or more")


def check_tolerance(tolerance: float | None) -> None:
    """Raise ExportError for an error that cannot be allowed."""
    if tolerance is not None and not is_number(tolerance, 0):
        raise ExportError(f"a tolerance of {tolerance!r} cannot be: give a number of 0 or more")


def onnx_inputs(
    session: Session, args: Sequence[object], kwargs: Mapping[str, object], names: Sequence[str] = ()
) -> Feeds:
    """The arrays to feed: keyword arguments by name, the others in their order.

    names: what the arguments are called, input by input, where the file's inputs have other names.

    Tensors the file has no input for (unused ones may have been dropped) are passed over; among positional ones, type
    and shape tell which, free sizes of one name being the same. Raises ExportError for an input of the file that
    nothing fits.
    """
    inputs = session.get_inputs()
    called = {argument: spec.name for argument, spec in zip(names, inputs, strict=False)}
    specs = dict(zip(names or [spec.name for spec in inputs], inputs, strict=True))
    named = [("", leaf) for leaf in leaves(list(args))]
    named += [(joined(path), leaf) for path, leaf in leaves_with_paths(dict(kwargs))]
    chosen = {name: leaf for name, leaf in named if name in specs and isinstance(leaf, Tensor)}
    others = [leaf for name, leaf in named if name not in chosen and isinstance(leaf, Tensor)]
    unnamed = [name for name in specs if name not in chosen]
    spare = len(others) - len(unnamed)
    sizes: dict[str, int] = {}
    for name, given in chosen.items():
        sizes |= _free_sizes(given, specs[name])
    for name in unnamed:
        while spare > 0 and not _fits(others[0], specs[name], sizes):
            others, spare = others[1:], spare - 1
        if others:
            chosen[name] = others.pop(0)
            sizes |= _free_sizes(chosen[name], specs[name])
    feeds: Feeds = {}
    for name, spec in specs.items():
        tensor = chosen.get(name)
        if tensor is None or not _fits(tensor, spec):
            raise ExportError(
                f"the ONNX input {name} is {spec.type} {spec.shape}, and no tensor like that is given in its place: "
                "give inputs like those it was exported with"
            )
        if tensor.dtype is torch.bfloat16:
            raise ExportError(f"the ONNX input {name} is bfloat16, which NumPy has not: export in another type")
        feeds[str(called.get(name, name))] = tensor.detach().cpu().numpy()
    return feeds


# Any: onnxruntime's NodeArg, which has no types
def _fits(tensor: Tensor, spec: Any, sizes: Mapping[str, int] | None = None) -> bool:
    """Whether the tensor is one for this input. sizes: of free dimensions by name, where they are known."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    same_type = spec.type == f"tensor({ {'float32': 'float', 'float64': 'double'}.get(dtype, dtype) })"
    if not same_type or len(spec.shape) != tensor.ndim:
        return False
    wanted = [size if isinstance(size, int) else (sizes or {}).get(size) for size in spec.shape]
    return all(size in (None, have) for size, have in zip(wanted, tensor.shape, strict=True))


def _free_sizes(tensor: Tensor, spec: Any) -> dict[str, int]:  # Any: as in ``_fits``
    return {str(name): size for name, size in zip(spec.shape, tensor.shape, strict=False) if isinstance(name, str)}


def compare(
    opened: Session, module: nn.Module, cases: Sequence[Inputs], tolerance: float | None, names: Sequence[str] = ()
) -> tuple[Agreement, ...]:
    """Both sides on each of the inputs. names: what the file's inputs were called after the module's arguments, if they
    have other names now.
    """
    outputs = [output.name for output in opened.get_outputs()]
    agreements = []
    for args, kwargs in cases:
        batch = batch_size((args, kwargs)) or 1
        feeds = onnx_inputs(opened, args, kwargs, names)
        side = "onnxruntime"
        try:
            got = [torch.from_numpy(np.asarray(array)) for array in opened.run(None, feeds)]
            side = "PyTorch"  # second, as it may write to its inputs
            with (
                torch.no_grad(),
                slow_attention(),
                same_values(module),
                same_buffers(module),  # the file starts from the same state each time
            ):
                expected = [tensor.detach().cpu() for tensor in tensors(module(*args, **kwargs))]
        except Exception as error:  # of onnxruntime, or of the model's own forward
            why = reason(error)
            raise ExportError(
                f"{side} fails on a batch of {batch} ({why}): give batch sizes and types it takes"
            ) from error
        if len(got) != len(expected):
            raise ExportError(
                f"the ONNX file has {counted(len(got), 'output')} and the module {len(expected)}: export it again"
            )
        for name, have, want in zip(outputs, got, expected, strict=True):
            limit = _tolerance(module, args, kwargs, want) if tolerance is None else tolerance
            agreements.append(_agreement(batch, name, have, want, limit))
    return tuple(agreements)


def _tolerance(module: nn.Module, *values: object) -> float:
    """That of the coarsest floating-point type among the module's tensors and these."""
    floats = [t for t in (*module.parameters(), *module.buffers(), *tensors(values)) if t.is_floating_point()]
    limits = [_TF32 if t.is_cuda and t.dtype is torch.float32 else _TOLERANCE.get(t.dtype, 0.1) for t in floats]
    return max(limits, default=0.0)


def _agreement(batch: int, name: str, got: Tensor, want: Tensor, tolerance: float) -> Agreement:
    """max |got − want| over the finite values of ``want``; the others must be the same."""
    where = f"in {name!r} on a batch of {batch}"
    if (got.dtype, got.shape) != (want.dtype, want.shape):
        one, other = (f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for t in (got, want))
        raise ExportError(f"onnxruntime gives {one} and PyTorch {other} {where}: fix that size with dynamic_shapes")
    if not want.is_floating_point():
        wrong = int((got != want).sum())
        if wrong:
            raise ExportError(
                f"onnxruntime and PyTorch differ in {wrong} of {counted(want.numel(), 'value')} {where}, which must "
                "be equal: leave that output out if ties or rounding decide it"
            )
        return Agreement(batch, name, 0.0, 0.0)
    got, want = got.double(), want.double()
    finite = want.isfinite()
    if want.numel() and not finite.any():
        raise ExportError(f"PyTorch gives no finite value {where}, so nothing can be compared: check the weights")
    max_abs, largest = _max_abs(got[finite] - want[finite]), _max_abs(want[finite])
    same_rest = torch.allclose(got[~finite], want[~finite], equal_nan=True)
    if not (same_rest and max_abs <= tolerance * (largest + 0.01)):  # so written that a NaN fails
        raise ExportError(
            f"onnxruntime and PyTorch differ by {max_abs:.2g} {where}, where {tolerance:g} of the largest value "
            f"{largest:.2g} is allowed: give a larger tolerance if that is good enough"
        )
    return Agreement(batch, name, max_abs, max_abs / largest if largest else 0.0)


def _max_abs(values: Tensor) -> float:
    """NaN where there is one."""
    return float(values.abs().max()) if values.numel() else 0.0
