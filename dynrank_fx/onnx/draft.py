"""The first draft of a file: the module converted, named, told about, and written."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..aliases import Kwargs
from ..errors import ExportError
from ..seals import blank_seals, seal
from ..tracing import Inputs
from ..version import __version__
from .convert import converted, parameter_count, renamed
from .dynamic import Dynamic, Shape, name_dimensions_, names_of_tensors, shapes_in, sizes_in
from .file import write_file
from .precision import Precision, cast, int8_weights_
from .random_inputs import SIZES, table_rows
from .session import runtime
from .stack import stacks_in

if TYPE_CHECKING:
    from onnx import ModelProto

MAX_BYTES = 2**31 - 2**24
"""What protobuf can hold, less room for the graph."""


@dataclass(frozen=True)
class Draft:
    """What a file is to be, as ``export_onnx`` was asked. shapes: the free ones by argument, dynamic: their names."""

    opset: int | None
    shapes: Kwargs | None
    dynamic: Dynamic | None
    input_names: Sequence[str]
    output_names: Sequence[str]
    precision: Precision
    external_data: bool | None
    metadata: Mapping[str, str]
    stacked: bool


@dataclass(frozen=True)
class Written:
    """What is known of a file when its model, which holds all weights, is gone.

    free: whether its batch is. feeds: the names of its inputs after the module's arguments, and names, what they are
    called in the file. shapes: of each of them. rows: of the tables that inputs index, by input. stacks: how many right
    factors each stack holds.
    """

    opset: int
    params: int
    free: bool
    feeds: tuple[str, ...]
    names: tuple[str, ...]
    shapes: tuple[Shape, ...]
    rows: Mapping[str, int]
    stacks: Mapping[str, int]

    @property
    def more_than_batch(self) -> bool:
        return any(isinstance(size, str) for shape in self.shapes for size in shape[1:])


def write_draft(path: Path, plain: nn.Module, inputs: Inputs, draft: Draft, *, only_batch: bool) -> Written:
    """Convert the module and write it. only_batch: no other dimension is to be free."""
    module = cast(plain, draft.precision)
    model, free = converted(module, inputs, draft.shapes, draft.opset, only_batch=only_batch, stacked=draft.stacked)
    renamed(model, lambda name: name.removeprefix("module.") if draft.precision is not Precision.FLOAT32 else name)
    if draft.dynamic:
        name_dimensions_(model, draft.dynamic, names_of_tensors(plain, inputs))
    if draft.precision is Precision.INT8_WEIGHTS:
        int8_weights_(model)
    feeds, rows = tuple(str(value.name) for value in model.graph.input), table_rows(model)
    _name(model, "input", draft.input_names)
    _name(model, "output", draft.output_names)
    made = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    if draft.opset not in (None, made):
        raise ExportError(
            f"torch's exporter makes no opset {draft.opset} of this model, but {made}: ask for that or a newer one "
            "that your onnxruntime knows, or leave opset out"
        )
    model.producer_name, model.producer_version = "dynrank-fx", __version__
    named = shapes_in(model)
    told = {**_versions(), "precision": draft.precision.value, SIZES: json.dumps(sizes_in(named.values(), inputs))}
    for key, value in {**told, **draft.metadata}.items():
        model.metadata_props.add(key=key, value=value)
    params, stacks, outside = (
        parameter_count(model),
        stacks_in(model),
        bytes_of(plain) > MAX_BYTES or bool(draft.external_data),
    )
    for key, value in zip(("sha256", "sha256_data"), blank_seals(outside), strict=False):
        model.metadata_props.add(key=key, value=value)
    write_file(model, path, outside)
    seal(path, path.with_name(f"{path.name}.data"))
    return Written(made, params, free, feeds, tuple(named), tuple(named.values()), rows, stacks)


def bytes_of(module: nn.Module) -> int:
    """Of its parameters and buffers."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def _versions() -> dict[str, str]:
    import onnx

    made = {"dynrank_fx": __version__, "torch": torch.__version__, "onnx": onnx.__version__}
    return {f"{name}_version": version for name, version in {**made, "onnxruntime": runtime().__version__}.items()}


def _name(model: ModelProto, what: str, names: Sequence[str]) -> None:
    """Names for the file's inputs or outputs, in their order; values inside that have one of them get another."""
    if not names:
        return
    values = list(getattr(model.graph, what))
    if len(names) != len(values) or len(set(names)) < len(names) or not all(names):
        raise ExportError(
            f"the file has {len(values)} {what}s ({', '.join(value.name for value in values)}): give as many {what} "
            "names, each once"
        )
    new = dict(zip((value.name for value in values), names, strict=True))
    others = [value.name for value in (*model.graph.input, *model.graph.output) if value.name not in new]
    for name in names:
        if name in others or any(each.name == name for each in model.graph.initializer):
            raise ExportError(f"{name!r} is the name of another input, output or weight: choose another {what} name")
    inside = {name for node in model.graph.node for name in node.output} - set(new)
    new |= {name: f"{name}_inside" for name in names if name in inside}
    renamed(model, lambda name: new.get(name, name))
