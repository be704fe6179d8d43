"""An ONNX file on disk: written beside its place, checked there, and only then given its name."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from .. import files
from ..errors import ExportError, StoreError, reason
from .precision import Precision

if TYPE_CHECKING:
    from google.protobuf.message import Message
    from onnx import ModelProto

_WORTH_A_FILE = 1024  # bytes of a tensor that is stored outside


def check_place(path: Path) -> None:
    """Raises ExportError for a path at which no file can be made."""
    if not path.parent.is_dir():
        raise ExportError(f"{path} cannot be written because there is no folder {path.parent}: make it first")
    try:
        place = files.check_file_place(path)
    except StoreError as error:
        raise ExportError(str(error)) from error
    if not os.access(place.parent, os.W_OK):
        raise ExportError(f"{path} cannot be written because the folder is not open to you: choose another")


@contextlib.contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """A path in a temporary folder beside ``path``, whose files take their places if all goes well: the weights before
    the graph, which would be none without them. Raises ExportError where the disk refuses.
    """
    try:
        with files.replacing(path) as beside:
            yield beside
    except StoreError as error:
        raise ExportError(str(error)) from error


def write_file(model: ModelProto, path: Path, outside: bool) -> None:
    """One file, or the graph and beside it the weights. The model has none afterwards."""
    import onnx

    if not outside:
        with open(path, "wb") as file:
            for piece in _serialized(model):
                file.write(piece)
        return
    beside = path.with_name(f"{path.name}.data")
    for tensor in model.graph.initializer:
        if len(tensor.raw_data) >= _WORTH_A_FILE:  # not by save_model, which looks for the file in the working folder
            onnx.external_data_helper.set_external_data(tensor, beside.name)
    onnx.save_model(model, path)
    if beside.exists():
        beside.chmod(path.stat().st_mode)  # onnx lets nobody else read it


def _serialized(model: ModelProto) -> Iterator[bytes]:
    """As ``SerializeToString``, one weight after the other: all at once would be a copy of them all.

    A message in a message is written as its field's number and kind, its length, and its own fields in any order.
    """
    weights = list(model.graph.initializer)
    del model.graph.initializer[:]
    rest = type(model)()
    rest.CopyFrom(model)
    rest.ClearField("graph")
    yield rest.SerializeToString()
    graph, sizes = model.graph.SerializeToString(), [weight.ByteSize() for weight in weights]
    heads = [_head(model.graph, "initializer", size) for size in sizes]
    yield _head(model, "graph", len(graph) + sum(map(len, heads)) + sum(sizes))
    yield graph
    for head, weight in zip(heads, weights, strict=True):
        yield head
        yield weight.SerializeToString()


def _head(message: Message, field: str, size: int) -> bytes:
    """What stands before a field that holds a message of this size: two numbers, seven bits a byte, the least first."""
    written = bytearray()
    for number in (message.DESCRIPTOR.fields_by_name[field].number << 3 | 2, size):
        while number > 127:
            written.append(number & 127 | 128)
            number >>= 7
        written.append(number)
    return bytes(written)


def check_file(path: Path, precision: Precision) -> None:
    """onnx's own checker with full shape inference. Raises ExportError."""
    import onnx

    try:
        onnx.checker.check_model(os.fspath(path), full_check=True)
    except Exception as error:  # of the checker, of shape inference, or of protobuf
        of_type = any(sign in str(error) for sign in ("unsupported type", "inconsistent type"))
        if of_type and precision is not Precision.FLOAT32:
            raise ExportError(
                f"ONNX of this opset has not every operation of the model in {precision.value} ({reason(error)}): "
                "export in float32 or float16, or with a newer opset"
            ) from error
        raise ExportError(f"the exporter made an invalid ONNX file ({reason(error)}): give another opset") from error
