"""ONNX files that agreed with PyTorch before they got their name.

The file is written beside its place, checked there, run by onnxruntime on several batch sizes, and only then moved.
Weights are stored once, as they are: no product of factors is folded into a dense matrix.
"""

from __future__ import annotations

import contextlib
import copy
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from . import __version__
from .errors import CaptureError, ExportError
from .inlining import holds_captured, inline
from .inputs import batch_size, in_order, split_inputs
from .net import unwrap
from .onnxcheck import Agreement, Provider, check_batch_sizes, compare, onnx_inputs, runtime, session
from .onnxconvert import converted, parameter_count, reason
from .scopes import quiet

__all__ = ["Agreement", "ExportReport", "Provider", "export_onnx", "onnx_inputs", "session", "verify_onnx"]

_MAX_BYTES = 2**31 - 2**24  # what protobuf can hold, less room for the graph


@dataclass(frozen=True)
class ExportReport:
    """What was written and compared. provider: the one that really ran it. params: floating-point values in it."""

    path: Path
    provider: str
    opset: int
    file_size: int
    params: int
    dynamic_batch: bool
    agreements: tuple[Agreement, ...]

    def __str__(self) -> str:
        size = f"{self.file_size / 1e6:.1f} MB" if self.file_size >= 1e6 else f"{self.file_size / 1e3:.1f} kB"
        batches = list(dict.fromkeys(agreement.batch for agreement in self.agreements))
        batch = "batch free" if self.dynamic_batch else f"batch fixed at {batches[0]}"
        worst_abs = max((agreement.max_abs for agreement in self.agreements), default=0.0)
        worst_rel = max((agreement.max_rel for agreement in self.agreements), default=0.0)
        return (
            f"{self.path}: {size}, opset {self.opset}, {batch}; agrees with PyTorch on "
            f"batch{'es' if len(batches) > 1 else ''} {', '.join(map(str, batches))} "
            f"(largest error {worst_abs:.2g} absolute, {worst_rel:.2g} relative), run by {self.provider}"
        )


def export_onnx(
    module: nn.Module,
    example_inputs: Any,
    path: str | os.PathLike[str],
    *,
    opset: int | None = None,
    dynamic_shapes: Any = None,
    batch_sizes: Sequence[int] = (1, 2, 5),
    providers: Sequence[Provider] | None = None,
    tolerance: float | None = None,
    metadata: Mapping[str, str] | None = None,
) -> ExportReport:
    """Write the module, in evaluation mode, to an ONNX file that onnxruntime agrees with.

    module: any nn.Module; a net of ``transform`` is exported in its present phases. dynamic_shapes: as in
    torch.export; by default the first dimension of every tensor is free. Where the model fixes its batch, the report
    says so and that batch alone is compared. providers: of onnxruntime; by default CUDA where it works, else the CPU.
    batch_sizes, tolerance: see ``verify_onnx``. metadata: more ``metadata_props`` for the file.

    Raises ExportError; then there is no new file, and one that was there is as it was.
    """
    check_batch_sizes(batch_sizes)
    runtime()
    plain = _in_evaluation(module)
    inputs = in_order(plain, split_inputs(example_inputs))
    _refuse_large(plain)
    with _replacing(Path(path)) as beside:
        model, free = converted(plain, inputs, dynamic_shapes, opset)
        found = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
        if opset not in (None, found):
            raise ExportError(f"the exporter made opset {found} where {opset} was asked for: leave opset out")
        model.producer_name, model.producer_version = "dynrank-fx", __version__
        for key, value in {"dynrank_fx_version": __version__, **(metadata or {})}.items():
            model.metadata_props.add(key=key, value=value)
        beside.write_bytes(model.SerializeToString())
        _check_file(beside)
        opened = session(beside, providers)
        sizes = batch_sizes if free else (batch_size(inputs) or 1,)
        agreements = compare(opened, plain, inputs, sizes, tolerance)
        file_size = beside.stat().st_size
    params, provider = parameter_count(model), opened.get_providers()[0]
    return ExportReport(Path(path), provider, found, file_size, params, free, agreements)


def verify_onnx(
    path: str | os.PathLike[str],
    module: nn.Module,
    example_inputs: Any,
    *,
    batch_sizes: Sequence[int] = (1, 2, 5),
    providers: Sequence[Provider] | None = None,
    tolerance: float | None = None,
) -> tuple[str, tuple[Agreement, ...]]:
    """The provider that ran the file, and how far every output is from PyTorch's on new rows of every batch size.

    tolerance: the largest error of a floating-point output as a share of its largest value, a hundredth of it being
    allowed absolutely; by default 1e-4 in float32, 5e-3 in float32 on CUDA (TF32) and 1e-2 in float16. Other outputs
    must be equal.

    Raises ExportError naming the output, the batch, the error and the tolerance, or why the file cannot be run.
    """
    check_batch_sizes(batch_sizes)
    opened = session(path, providers)
    agreements = compare(opened, _in_evaluation(module), split_inputs(example_inputs), batch_sizes, tolerance)
    return opened.get_providers()[0], agreements


# The module as it is exported


def _in_evaluation(module: nn.Module) -> nn.Module:
    """A copy in evaluation mode whose sites are ordinary nodes."""
    kind = type(module).__name__
    try:
        with quiet():
            twin = copy.deepcopy(unwrap(module))
    except Exception as error:
        raise ExportError(f"{kind} cannot be copied ({reason(error)}): make it support copy.deepcopy") from error
    try:
        twin.eval()
    except CaptureError as error:
        raise ExportError(f"{kind} cannot be exported to ONNX: {error}") from error
    except NotImplementedError:  # a graph made by torch.export, whose mode is in its nodes
        for part in twin.modules():
            part.training = False
    return inline(twin) if holds_captured(twin) else twin


def _refuse_large(module: nn.Module) -> None:
    size = sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
    if size > _MAX_BYTES:
        raise ExportError(
            f"{type(module).__name__} has {size / 1e9:.1f} GB of weights and one ONNX file holds 2 GB: "
            "truncate to lower ranks, or export in float16 (external data is not supported yet)"
        )


# The file


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A path in a temporary folder beside ``path``, whose file takes its place if all goes well. Fails early."""
    if not path.parent.is_dir():
        raise ExportError(f"{path} cannot be written because there is no folder {path.parent}: make it first")
    if path.is_dir():
        raise ExportError(f"{path} is a folder: give the name of a file")
    try:
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=".part", dir=path.parent) as folder:
            beside = Path(folder, path.name)
            yield beside
            with open(beside, "r+b") as file:
                os.fsync(file.fileno())
            os.replace(beside, path)
    except OSError as error:
        why = error.strerror or error
        raise ExportError(f"{path} could not be written ({why}); what was there before is unchanged") from error


def _check_file(path: Path) -> None:
    import onnx

    try:
        onnx.checker.check_model(os.fspath(path), full_check=True)
    except Exception as error:
        raise ExportError(f"the exporter made an invalid ONNX file ({reason(error)}): give another opset") from error
