"""An ONNX file in onnxruntime: a session on the provider that was asked for, and how far it is from PyTorch."""

from __future__ import annotations

import importlib
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np
import torch

from ..checks import checked_path
from ..errors import ExportError, reason
from ..files import finish
from ..seals import check_seal

Provider: TypeAlias = str | tuple[str, Mapping[str, object]]
"""The name of a provider, alone or with its options, whose values are its own affair."""

Session: TypeAlias = Any
"""An ``onnxruntime.InferenceSession``: onnxruntime comes without types."""

Feeds: TypeAlias = dict[str, np.ndarray]
"""An array for each input of a file, by its name."""

_SILENT = 4  # the severity of onnxruntime's log above which there is none
_DAMAGED = ("Protobuf parsing failed", "protobuf parsing failed", "No graph was found in the protobuf")
_WITHOUT_WEIGHTS = ("External data path", "External initializer")
_TOO_NEW = ("Unsupported model IR version", "guarantees* support for models stamped with official released onnx opset")
_NOISE = re.compile(r"\[ONNXRuntimeError\] : \d+ : [A-Z_]+ : |Load model from \S+ failed:|\S+\.(cc|h):\d+ .*\) ")


def runtime() -> ModuleType:
    """The module ``onnxruntime``, which is imported when it is needed. Raises ExportError where there is none."""
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise ExportError(
            "onnxruntime, which checks the file, is not installed: pip install 'dynrank-fx[gpu]' or 'dynrank-fx[cpu]'"
        ) from error


def threads() -> int:
    """How many threads a session runs on: OMP_NUM_THREADS, which onnxruntime itself does not heed; else 0, which leaves
    it to onnxruntime (its own choice is one for each physical core).
    """
    said = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(said) if said.isdigit() else 0


def check_provider(provider: object) -> None:
    """Raises ExportError for one that this onnxruntime has not."""
    if not isinstance(provider, str) and not (isinstance(provider, tuple) and len(provider) == 2):
        raise ExportError(f"{provider!r} is no provider: give a name, or a tuple of a name and a dict of its options")
    name, available = provider if isinstance(provider, str) else provider[0], runtime().get_available_providers()
    if name not in available:
        raise ExportError(f"this onnxruntime has no {name}: ask for one of {', '.join(available)}")


def best_provider() -> str:
    """CUDA where it works, else the CPU."""
    cuda = "CUDAExecutionProvider" in runtime().get_available_providers() and torch.cuda.is_available()
    return "CUDAExecutionProvider" if cuda else "CPUExecutionProvider"


def session(path: str | os.PathLike[str], providers: Sequence[Provider] | None = None) -> Session:
    """An InferenceSession whose first provider, ``get_providers()[0]``, is the one asked for and really works.

    providers: by default CUDA where it works, else the CPU. Raises ExportError for a provider that does not come up,
    and for a file that cannot be run.
    """
    path = checked_path(path)
    finish(path)
    if not path.is_file():
        raise ExportError(f"there is no file {path} to run: export it first")
    opened = _opened(os.path.realpath(path), path.name, providers)  # weights lie beside the file, not beside a link
    check_seal(path)
    return opened


def session_of(model: bytes, provider: Provider) -> Session:
    """As ``session``, of a serialized model and one provider."""
    return _opened(model, "the model", (provider,))


def _opened(source: str | bytes, name: str, providers: Sequence[Provider] | None) -> Session:
    ort = runtime()
    available = ort.get_available_providers()
    cuda = best_provider() == "CUDAExecutionProvider"
    asked = list(providers or (*(("CUDAExecutionProvider",) if cuda else ()), "CPUExecutionProvider"))
    names = [provider if isinstance(provider, str) else provider[0] for provider in asked]
    for each in asked:
        check_provider(each)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads()
    options.log_severity_level = _SILENT  # what goes wrong comes back as an exception, or as another provider
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")  # for ``elsewhere``
    try:
        opened = ort.InferenceSession(source, options, providers=asked, enable_fallback=0)
    except Exception as error:  # onnxruntime has kinds of its own, without a common base
        if cuda and not providers and not _of_the_file(str(error)):
            return _opened(source, name, ("CPUExecutionProvider",))
        raise ExportError(_refusal(error, name, names[0], available)) from error
    used = opened.get_providers()[0]
    if providers and used != names[0]:
        raise ExportError(f"{names[0]} did not come up: install the libraries it needs, or ask for {used}")
    if providers and not isinstance(asked[0], str):
        check_options(opened, *asked[0])
    return opened


def elsewhere(opened: Session) -> dict[str, int]:
    """How many nodes run on another provider than the first, by their operation: it may lack one without a word, such
    as Attention. Empty where this onnxruntime does not say.
    """
    # Any: onnxruntime's, which has no types
    said: Sequence[Any] = getattr(opened, "get_provider_graph_assignment_info", tuple)()
    first = opened.get_providers()[0]
    return dict(Counter(str(node.op_type) for part in said if part.ep_name != first for node in part.get_nodes()))


def check_options(opened: Session, provider: str, options: Mapping[str, object]) -> None:
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


def bound(session: Session, feeds: Feeds) -> Callable[[], None]:
    """A call that runs the session on values that are where the provider wants them, inputs and outputs alike.

    Outputs stay where the first run put them, as a CUDA graph needs it.
    """
    ort = runtime()
    device = "cuda" if session.get_providers()[0] in ("CUDAExecutionProvider", "TensorrtExecutionProvider") else "cpu"
    binding = session.io_binding()
    for name, value in feeds.items():
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value), device, 0))
    for output in session.get_outputs():
        binding.bind_output(output.name, device, 0)
    session.run_with_iobinding(binding)
    for output, value in zip(session.get_outputs(), binding.get_outputs(), strict=True):
        binding.bind_ortvalue_output(output.name, value)

    def run() -> None:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    return run
