"""What an ONNX file takes: its graph read for that, and random inputs of its types and shapes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from ..checks import is_whole
from ..errors import ExportError, first_line, reason
from .session import Feeds, Session

if TYPE_CHECKING:
    from onnx import ModelProto

SIZES = "dynrank_sizes"
"""The entry of a file's metadata that has the example's size of each free dimension, by name, as JSON."""

_TYPES = {"float": "float32", "double": "float64", "float16": "float16", "int64": "int64", "int32": "int32"}
_TYPES |= {"bool": "bool", "uint8": "uint8", "int8": "int8"}


def loaded(path: str | os.PathLike[str]) -> ModelProto:
    """The graph of an ONNX file, without weights that lie in a file of their own. Raises ExportError."""
    import onnx

    try:
        return onnx.load(path, load_external_data=False)
    except Exception as error:  # of protobuf, or of the disk
        raise ExportError(f"{path} is no ONNX file, or is damaged ({reason(error)}): export it again") from error


def table_rows(model: ModelProto) -> dict[str, int]:
    """By input of integers, the rows of the least table that the graph looks them up in."""
    weights = {each.name: each.dims[0] for each in model.graph.initializer if len(each.dims) > 1}
    made = {name: node for node in model.graph.node for name in node.output}
    rows: dict[str, int] = {}
    for node in model.graph.node:
        if node.op_type != "Gather" or any(a.name == "axis" and a.i != 0 for a in node.attribute):
            continue
        table, name = node.input
        while table in made and made[table].op_type in ("DequantizeLinear", "Cast"):
            table = made[table].input[0]
        while name in made and made[name].op_type in ("Cast", "Reshape", "Squeeze", "Unsqueeze"):
            name = made[name].input[0]
        if table in weights and name not in made:
            rows[name] = min(weights[table], rows.get(name, weights[table]))
    return rows


def random_inputs(opened: Session, batch: int, seed: int = 0, rows: Mapping[str, int] | None = None) -> Feeds:
    """Inputs of a session's types and shapes: normal floats, integers below their ``table_rows``, or zeros and ones
    where none are known. Of free sizes the first is the batch; others are as in the example that the file was made
    from, 16 where it does not say.
    """
    generator, feeds = np.random.default_rng(seed), {}
    sizes = _noted_sizes(opened)
    for spec in opened.get_inputs():
        kind = _TYPES.get(spec.type.removeprefix("tensor(").removesuffix(")"))
        if kind is None:
            raise ExportError(f"the input {spec.name} is {spec.type}, of which no random values can be made")
        shape = [
            size if isinstance(size, int) else batch if axis == 0 else sizes.get(size, 16)
            for axis, size in enumerate(spec.shape)
        ]
        if kind.startswith("float"):
            feeds[spec.name] = generator.standard_normal(shape).astype(kind)
        else:
            limit = 2 if kind == "bool" else (rows or {}).get(spec.name, 2)
            feeds[spec.name] = generator.integers(0, limit, shape).astype(kind)
    return feeds


def _noted_sizes(opened: Session) -> dict[str, int]:
    """The free sizes of the example that a file was made from, by name; none where it does not note them."""
    try:
        sizes = json.loads(opened.get_modelmeta().custom_metadata_map.get(SIZES, "{}"))
        if not isinstance(sizes, dict) or not all(is_whole(size, 1) for size in sizes.values()):
            raise ValueError(sizes)
    except ValueError as error:  # of Unicode too
        raise ExportError(
            f"what the file says of its inputs cannot be read ({first_line(error)}): it is damaged; export it again"
        ) from error
    return sizes
