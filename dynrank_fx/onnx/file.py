"""An ONNX file on disk: written beside its place, checked there, and only then given its name."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import ExportError, reason
from .precision import Precision

_WORTH_A_FILE = 1024  # bytes of a tensor that is stored outside


def check_place(path: Path) -> None:
    """Raises ExportError for a path at which no file can be made."""
    if not path.parent.is_dir():
        raise ExportError(f"{path} cannot be written because there is no folder {path.parent}: make it first")
    if path.is_dir():
        raise ExportError(f"{path} is a folder: give the name of a file")
    if not os.access(path.parent, os.W_OK):
        raise ExportError(f"{path} cannot be written because the folder is not open to you: choose another")


@contextlib.contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """A path in a temporary folder beside ``path``, whose file takes its place if all goes well."""
    try:
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=".part", dir=path.parent) as folder:
            beside = Path(folder, path.name)
            yield beside
            # The weights first: a file without them would be none.
            for made in sorted(Path(folder).iterdir(), key=lambda made: made == beside):
                with open(made, "r+b") as file:
                    os.fsync(file.fileno())
                os.replace(made, path.with_name(made.name))
    except OSError as error:
        why = error.strerror or error
        raise ExportError(f"{path} could not be written ({why}); what was there before is unchanged") from error


def write_file(model: Any, path: Path, outside: bool) -> None:
    """One file, or the graph and beside it the weights."""
    import onnx

    if not outside:
        path.write_bytes(model.SerializeToString())
        return
    beside = path.with_name(f"{path.name}.data")
    for tensor in model.graph.initializer:
        if len(tensor.raw_data) >= _WORTH_A_FILE:  # not by save_model, which looks for the file in the working folder
            onnx.external_data_helper.set_external_data(tensor, beside.name)
    onnx.save_model(model, path)
    if beside.exists():
        beside.chmod(path.stat().st_mode)  # onnx lets nobody else read it


def check_file(path: Path, precision: Precision) -> None:
    """onnx's own checker with full shape inference. Raises ExportError."""
    import onnx

    try:
        onnx.checker.check_model(os.fspath(path), full_check=True)
    except Exception as error:
        of_type = any(sign in str(error) for sign in ("unsupported type", "inconsistent type"))
        if of_type and precision is not Precision.FLOAT32:
            raise ExportError(
                f"ONNX of this opset has not every operation of the model in {precision.value} ({reason(error)}): "
                "export in float32 or float16, or with a newer opset"
            ) from error
        raise ExportError(f"the exporter made an invalid ONNX file ({reason(error)}): give another opset") from error
