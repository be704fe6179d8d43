"""An ONNX file in onnxruntime: a session on the provider that was asked for, and how far it is from PyTorch."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .errors import ExportError
from .inputs import Inputs, batch_size
from .onnxconvert import joined, reason, tensors
from .scopes import same_buffers, slow_attention

Provider: TypeAlias = str | tuple[str, dict[str, Any]]

# The largest error as a share of the output's largest value, by the coarsest type that takes part: about a thousand
# roundings of float32 and ten of float16. What differs by more was computed in another way.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_SILENT, _WARNING = 4, 2  # severities of onnxruntime's log, the second its default
_DAMAGED = ("Protobuf parsing failed", "No graph was found in the protobuf")
_WITHOUT_WEIGHTS = ("External data path", "External initializer")
_TOO_NEW = ("Unsupported model IR version", "guarantees* support for models stamped with official released onnx opset")
_NOISE = re.compile(r"\[ONNXRuntimeError\] : \d+ : [A-Z_]+ : |Load model from \S+ failed:|\S+\.(cc|h):\d+ .*\) ")
_TF32 = 5e-3  # float32 on CUDA: both sides may multiply with float16's ten bits


@dataclass(frozen=True)
class Agreement:
    """One output on one batch: the largest error, and its share of the largest value that PyTorch gives."""

    batch: int
    output: str
    max_abs: float
    max_rel: float


def check_batch_sizes(batch_sizes: Sequence[int]) -> None:
    if not batch_sizes or min(batch_sizes) < 1:
        raise ExportError(f"batch sizes {list(batch_sizes)} leave nothing to compare: give one or more, each 1 or more")


def runtime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise ExportError(
            "onnxruntime, which checks the file, is not installed: pip install 'dynrank-fx[gpu]' or 'dynrank-fx[cpu]'"
        ) from error
    return onnxruntime


def threads() -> int:
    """How many threads a session runs on: OMP_NUM_THREADS, which onnxruntime itself does not heed; else 0, which leaves
    it to onnxruntime (its own choice is one for each physical core).
    """
    said = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(said) if said.isdigit() else 0


def check_provider(provider: Provider) -> None:
    """Raises ExportError for one that this onnxruntime has not."""
    name, available = provider if isinstance(provider, str) else provider[0], runtime().get_available_providers()
    if name not in available:
        raise ExportError(f"this onnxruntime has no {name}: ask for one of {', '.join(available)}")


def session(path: str | os.PathLike[str], providers: Sequence[Provider] | None = None) -> Any:
    """An InferenceSession whose first provider, ``get_providers()[0]``, is the one asked for and really works.

    providers: by default CUDA where it works, else the CPU. Raises ExportError for a provider that does not come up,
    and for a file that cannot be run.
    """
    path = Path(path)
    if not path.is_file():
        raise ExportError(f"there is no file {path} to run: export it first")
    return _opened(os.fspath(path), path.name, providers)


def session_of(model: bytes, provider: Provider) -> Any:
    """As ``session``, of a serialized model and one provider."""
    return _opened(model, "the model", (provider,))


def _opened(source: str | bytes, name: str, providers: Sequence[Provider] | None) -> Any:
    ort = runtime()
    available = ort.get_available_providers()
    cuda = "CUDAExecutionProvider" in available and torch.cuda.is_available()
    asked = list(providers or (*(("CUDAExecutionProvider",) if cuda else ()), "CPUExecutionProvider"))
    names = [provider if isinstance(provider, str) else provider[0] for provider in asked]
    for each in asked:
        check_provider(each)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads()
    options.log_severity_level = _SILENT  # what goes wrong comes back as an exception, or as another provider
    ort.set_default_logger_severity(_SILENT)
    try:
        opened = ort.InferenceSession(source, options, providers=asked, enable_fallback=0)
    except Exception as error:
        if cuda and not providers and not _of_the_file(str(error)):
            return _opened(source, name, ("CPUExecutionProvider",))
        raise ExportError(_refusal(error, name, names[0], available)) from error
    finally:
        ort.set_default_logger_severity(_WARNING)
    used = opened.get_providers()[0]
    if providers and used != names[0]:
        raise ExportError(f"{names[0]} did not come up: install the libraries it needs, or ask for {used}")
    if providers and not isinstance(asked[0], str):
        check_options(opened, *asked[0])
    return opened


def check_options(opened: Any, provider: str, options: Mapping[str, Any]) -> None:
    """Some providers take an option that they do not have without a word; the CPU's does not say which it has."""
    known = opened.get_provider_options()[provider]
    unknown = [name for name in options if known and name not in known]
    if unknown:
        raise ExportError(f"{provider} has no option {', '.join(unknown)}: its options are {', '.join(sorted(known))}")


def _of_the_file(said: str) -> bool:
    return any(sign in said for sign in (*_DAMAGED, *_WITHOUT_WEIGHTS, *_TOO_NEW))


def _refusal(error: Exception, name: str, provider: str, available: Sequence[str]) -> str:
    """A sentence for what onnxruntime says when it does not open a file."""
    said, why = str(error), _NOISE.sub("", reason(error))[:300]
    others = ", ".join(each for each in available if each != provider)
    ask = f", or ask for one of {others}" if others else ""
    if any(sign in said for sign in _DAMAGED):
        return f"{name} is no ONNX file, or is damaged ({why}): export it again"
    if any(sign in said for sign in _WITHOUT_WEIGHTS):
        return f"the weights of {name} lie in a file beside it, which is missing or damaged: copy both, or export again"
    if any(sign in said for sign in _TOO_NEW):
        return (
            f"{name} is of a newer ONNX than this onnxruntime knows: upgrade onnxruntime, or export with a lower opset"
        )
    if "NOT_IMPLEMENTED" in said:
        return f"{provider} cannot run {name} ({why}): export it in float32 or float16{ask}"
    if "install" in said.lower() and provider != "CPUExecutionProvider":
        return f"{provider} did not come up: install the libraries it needs{ask}"
    return f"onnxruntime cannot run {name} with {provider} ({why}): export it again, or ask for another provider"


def onnx_inputs(
    session: Any, args: Sequence[Any], kwargs: Mapping[str, Any], names: Sequence[str] = ()
) -> dict[str, np.ndarray]:
    """The arrays to feed: keyword arguments by name, the others in their order.

    names: what the arguments are called, input by input, where the file's inputs have other names.

    Tensors the file has no input for (unused ones may have been dropped) are passed over; among positional ones, type
    and shape tell which. Raises ExportError for an input of the file that nothing fits.
    """
    inputs = session.get_inputs()
    called = {argument: spec.name for argument, spec in zip(names, inputs, strict=False)}
    specs = dict(zip(names or [spec.name for spec in inputs], inputs, strict=True))
    leaves = [("", leaf) for leaf in pytree.tree_leaves(list(args))]
    leaves += [(joined(path), leaf) for path, leaf in pytree.tree_flatten_with_path(dict(kwargs))[0]]
    chosen = {name: leaf for name, leaf in leaves if name in specs and isinstance(leaf, Tensor)}
    others = [leaf for name, leaf in leaves if name not in chosen and isinstance(leaf, Tensor)]
    unnamed = [name for name in specs if name not in chosen]
    spare = len(others) - len(unnamed)
    for name in unnamed:
        while spare > 0 and not _fits(others[0], specs[name]):
            others, spare = others[1:], spare - 1
        if others:
            chosen[name] = others.pop(0)
    feeds = {}
    for name, spec in specs.items():
        tensor = chosen.get(name)
        if tensor is None or not _fits(tensor, spec):
            raise ExportError(
                f"the ONNX input {name} is {spec.type} {spec.shape}, and no tensor like that is given in its place: "
                "give inputs like those it was exported with"
            )
        if tensor.dtype is torch.bfloat16:
            raise ExportError(f"the ONNX input {name} is bfloat16, which NumPy has not: export in another type")
        feeds[called.get(name, name)] = tensor.detach().cpu().numpy()
    return feeds


def _fits(tensor: Tensor, spec: Any) -> bool:
    dtype = str(tensor.dtype).removeprefix("torch.")
    same_type = spec.type == f"tensor({ {'float32': 'float', 'float64': 'double'}.get(dtype, dtype) })"
    fixed = {i: size for i, size in enumerate(spec.shape) if isinstance(size, int)}
    return same_type and len(spec.shape) == tensor.ndim and all(tensor.shape[i] == fixed[i] for i in fixed)


def compare(
    opened: Any, module: nn.Module, cases: Sequence[Inputs], tolerance: float | None, names: Sequence[str] = ()
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
                same_buffers(module),
            ):  # the file starts from the same state each time
                expected = [tensor.detach().cpu() for tensor in tensors(module(*args, **kwargs))]
        except Exception as error:
            why = reason(error)
            raise ExportError(
                f"{side} fails on a batch of {batch} ({why}): give batch sizes and types it takes"
            ) from error
        if len(got) != len(expected):
            raise ExportError(f"the ONNX file has {len(got)} outputs and the module {len(expected)}: export it again")
        for name, have, want in zip(outputs, got, expected, strict=True):
            limit = _tolerance(module, args, kwargs, want) if tolerance is None else tolerance
            agreements.append(_agreement(batch, name, have, want, limit))
    return tuple(agreements)


def _tolerance(module: nn.Module, *values: Any) -> float:
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
                f"onnxruntime and PyTorch differ in {wrong} of {want.numel()} values {where}, which must be equal: "
                "leave that output out if ties or rounding decide it"
            )
        return Agreement(batch, name, 0.0, 0.0)
    got, want = got.double(), want.double()
    finite = want.isfinite()
    if want.numel() and not finite.any():
        raise ExportError(f"PyTorch gives no finite value {where}, so nothing can be compared: check the weights")
    max_abs, largest = _largest(got[finite] - want[finite]), _largest(want[finite])
    same_rest = torch.allclose(got[~finite], want[~finite], equal_nan=True)
    if not (same_rest and max_abs <= tolerance * (largest + 0.01)):  # so written that a NaN fails
        raise ExportError(
            f"onnxruntime and PyTorch differ by {max_abs:.2g} {where}, where {tolerance:g} of the largest value "
            f"{largest:.2g} is allowed: give a larger tolerance if that is good enough"
        )
    return Agreement(batch, name, max_abs, max_abs / largest if largest else 0.0)


def _largest(values: Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0
