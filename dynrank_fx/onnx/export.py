"""ONNX files that agreed with PyTorch before they got their name.

The file is written beside its place, checked there, run by onnxruntime on several batch sizes, and only then moved.
Weights are stored once, as they are: no product of factors is folded into a dense matrix.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..aliases import JsonObject
from ..checks import is_whole, names_of
from ..errors import CaptureError, ExportError, reason
from ..rewrite import holds_captured, inline_
from ..seals import blank_seals, seal
from ..tracing import (
    DynamicShapes,
    ExampleInputs,
    Inputs,
    batch_size,
    in_order,
    quiet,
    shell,
    split_inputs,
    unwrap,
    with_batch,
)
from ..version import __version__
from .agreement import Agreement, check_batch_sizes, check_tolerance, compare
from .convert import converted, parameter_count, renamed
from .dynamic import Dynamic, Shape, name_dimensions_, named_shapes, other_sizes, shapes_in, sizes_in, with_sizes
from .file import check_file, check_place, replacing_file, write_file
from .precision import Precision, cast, int8_weights_
from .random_inputs import SIZES, table_rows
from .session import Provider, check_provider, runtime, session

if TYPE_CHECKING:
    from onnx import ModelProto

_CPU = "CPUExecutionProvider"
_MAX_BYTES = 2**31 - 2**24  # what protobuf can hold, less room for the graph


@dataclass(frozen=True)
class ExportReport:
    """What was written and compared; printed, it is a sentence.

    Attributes:
        path: The file.
        provider: The provider of onnxruntime that really ran it.
        opset: The version of ONNX's operators in it.
        file_size: Bytes on disk, weights beside the file included.
        params: How many floating-point values it stores.
        dynamic_batch: Whether the batch is free.
        agreements: How far every output is from PyTorch's, on every batch that was compared.
        shapes: The sizes of every input of the file, the free ones by name.
    """

    path: Path
    provider: str
    opset: int
    file_size: int
    params: int
    dynamic_batch: bool
    agreements: tuple[Agreement, ...]
    shapes: Mapping[str, Shape] = field(default_factory=dict)

    def to_json(self) -> JsonObject:
        """The report as JSON values.

        Returns:
            A dict, with the file's path as text.
        """
        return {**asdict(self), "path": str(self.path)}

    def __str__(self) -> str:
        size = f"{self.file_size / 1e6:.1f} MB" if self.file_size >= 1e6 else f"{self.file_size / 1e3:.1f} kB"
        batches = list(dict.fromkeys(agreement.batch for agreement in self.agreements))
        names = dict.fromkeys(name for shape in self.shapes.values() for name in shape if isinstance(name, str))
        free = f"{_and(list(names) or ['batch'])} free" if names or self.dynamic_batch else ""
        fixed = "" if self.dynamic_batch else f"batch fixed at {batches[0]}"
        inputs = "; ".join(f"{name} is {' x '.join(map(str, shape))}" for name, shape in self.shapes.items() if shape)
        batch = ", ".join(filter(None, (fixed, free))) + (f" ({inputs})" if inputs else "")
        worst_abs = max((agreement.max_abs for agreement in self.agreements), default=0.0)
        worst_rel = max((agreement.max_rel for agreement in self.agreements), default=0.0)
        return (
            f"{self.path}: {size}, opset {self.opset}, {batch}; agrees with PyTorch on "
            f"batch{'es' if len(batches) > 1 else ''} {', '.join(map(str, batches))} "
            f"(largest error {worst_abs:.2g} absolute, {worst_rel:.2g} relative), run by {self.provider}"
        )


def export_onnx(
    module: nn.Module,
    example_inputs: ExampleInputs,
    path: str | os.PathLike[str],
    *,
    opset: int | None = None,
    dynamic_shapes: DynamicShapes | None = None,
    dynamic: Dynamic | None = None,
    input_names: Sequence[str] = (),
    output_names: Sequence[str] = (),
    precision: Precision = Precision.FLOAT32,
    external_data: bool | None = None,
    batch_sizes: Sequence[int] = (1, 2, 5),
    more_inputs: Sequence[ExampleInputs] = (),
    providers: Sequence[Provider] | None = None,
    tolerance: float | None = None,
    metadata: Mapping[str, str] | None = None,
) -> ExportReport:
    """Write a module, in evaluation mode, to an ONNX file that onnxruntime agrees with.

    The file gets its name only after onnxruntime has run it and agreed with PyTorch. Where the model fixes its batch,
    the report says so and that batch alone is compared.

    Args:
        module: An ``nn.Module``; a net of ``transform`` is exported in its present phases.
        example_inputs: A tuple of positional arguments, a dict of keyword arguments, or the pair ``(args, kwargs)``.
        path: The file to write.
        opset: The version of ONNX's operators; by default what torch's exporter takes.
        dynamic_shapes: As in ``torch.export``; by default every dimension that the model leaves free is free, under
            one name in all inputs (``batch``, ``sequence``, ``height`` and so on), and is compared at another size too.
        dynamic: In its place, free dimensions by argument, under a name, such as ``{"x": {0: "batch"}}``.
        input_names: Names for the file's inputs, in order; by default those of the arguments.
        output_names: Names for its outputs, in order; by default ``output`` or what the model calls them.
        precision: The types that its numbers are stored and multiplied in; it is compared with the module as it is.
        external_data: Whether weights go into a file of their own, ``path`` with ``.data`` added; by default where one
            file cannot hold them.
        batch_sizes: The batch sizes to compare on.
        more_inputs: Real inputs to compare on besides, each as ``example_inputs``.
        providers: Those of onnxruntime; by default CUDA where it works, else the CPU. Where another than the CPU ran,
            the CPU is compared too.
        tolerance: The largest error that is allowed; see ``verify_onnx``.
        metadata: More entries for the file's ``metadata_props``.

    Returns:
        What was written and compared.

    Raises:
        ExportError: Where the file cannot be made or does not agree; there is then no new file, and one that was there
            is as it was.
    """
    check_batch_sizes(batch_sizes)
    _check_providers(providers)
    check_tolerance(tolerance)
    check_opset(opset)
    check_place(Path(path))
    if Path(path).suffix != ".onnx":
        raise ExportError(f"{path} is no name of an ONNX file: give one that ends in .onnx")
    for names in (input_names, output_names):
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise ExportError(f"{names!r} are no names of inputs or outputs: give a list of texts")
    for key, value in (metadata or {}).items():
        if not (isinstance(key, str) and isinstance(value, str)):
            raise ExportError(f"metadata are texts by name, not {key!r}: {value!r}; write it as a text")
    plain = _in_evaluation(module)
    inputs = in_order(plain, split_inputs(example_inputs))
    large = _bytes(plain) > _MAX_BYTES
    if large and external_data is False:
        raise ExportError(
            f"{type(module).__name__} has {_bytes(plain) / 1e9:.1f} GB of weights and one ONNX file holds "
            "2 GB: leave external_data out"
        )
    if not isinstance(precision, Precision):
        raise ExportError(f"{precision!r} is no precision of a file: give one of {names_of(Precision)}")
    if dynamic is not None and dynamic_shapes is not None:
        raise ExportError("give dynamic or dynamic_shapes, not both: they say the same")
    shapes = dynamic_shapes if dynamic is None else named_shapes(plain, inputs, dynamic)
    allowed = precision.tolerance if tolerance is None else tolerance

    def made(only_batch: bool) -> ExportReport:
        with replacing_file(Path(path)) as beside:
            written = _written(
                beside,
                plain,
                inputs,
                shapes,
                dynamic,
                opset,
                input_names,
                output_names,
                precision,
                external_data,
                metadata,
                only_batch,
            )
            try:
                check_file(beside, precision)
                limits = [written.rows.get(name) for name in written.feeds]
                sizes = batch_sizes if written.free else (batch_size(inputs) or 1,)
                cases = _cases(inputs, sizes, limits)
                cases += _of_other_sizes(plain, inputs, written, required=dynamic is not None)
                cases += [split_inputs(each) for each in more_inputs]
                opened = session(beside, providers)
                agreements = compare(opened, plain, cases, allowed, written.feeds)
                provider = opened.get_providers()[0]
                if provider != _CPU:
                    _compare_on_cpu(beside, plain, cases, allowed, written.feeds)
            except ExportError as error:
                if written.more_than_batch and not only_batch:
                    raise _TooFreeError(str(error)) from error
                raise
            file_size = sum(file.stat().st_size for file in beside.parent.iterdir())
        return ExportReport(
            Path(path),
            provider,
            written.opset,
            file_size,
            written.params,
            written.free,
            agreements,
            dict(zip(written.names, written.shapes, strict=True)),
        )

    if shapes is None:
        with contextlib.suppress(_TooFreeError):
            return made(only_batch=False)
    return made(only_batch=True)


class _TooFreeError(ExportError):
    """A file of which more than the batch is free, without having been asked for, does not serve."""


@dataclass(frozen=True)
class _Written:
    """What is known of a file when its model, which holds all weights, is gone.

    free: whether its batch is. feeds: the names of its inputs after the module's arguments, and names, what they are
    called in the file. shapes: of each of them. rows: of the tables that inputs index, by input.
    """

    opset: int
    params: int
    free: bool
    feeds: tuple[str, ...]
    names: tuple[str, ...]
    shapes: tuple[Shape, ...]
    rows: Mapping[str, int]

    @property
    def more_than_batch(self) -> bool:
        return any(isinstance(size, str) for shape in self.shapes for size in shape[1:])


def _written(
    path: Path,
    plain: nn.Module,
    inputs: Inputs,
    shapes: DynamicShapes | None,
    dynamic: Dynamic | None,
    opset: int | None,
    input_names: Sequence[str],
    output_names: Sequence[str],
    precision: Precision,
    external_data: bool | None,
    metadata: Mapping[str, str] | None,
    only_batch: bool,
) -> _Written:
    """Convert the module and write it."""
    model, free = converted(cast(plain, precision), inputs, shapes, opset, only_batch=only_batch)
    renamed(model, lambda name: name.removeprefix("module.") if precision is not Precision.FLOAT32 else name)
    if dynamic is not None:
        name_dimensions_(model, dynamic)
    if precision is Precision.INT8_WEIGHTS:
        int8_weights_(model)
    feeds, rows = tuple(str(value.name) for value in model.graph.input), table_rows(model)
    _name(model, "input", input_names)
    _name(model, "output", output_names)
    made = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    if opset not in (None, made):
        raise ExportError(
            f"torch's exporter makes no opset {opset} of this model, but {made}: ask for that or a newer one that "
            "your onnxruntime knows, or leave opset out"
        )
    model.producer_name, model.producer_version = "dynrank-fx", __version__
    named = shapes_in(model)
    told = {**_versions(), "precision": precision.value, SIZES: json.dumps(sizes_in(named.values(), inputs))}
    for key, value in {**told, **(metadata or {})}.items():
        model.metadata_props.add(key=key, value=value)
    params, outside = parameter_count(model), _bytes(plain) > _MAX_BYTES or bool(external_data)
    for key, value in zip(("sha256", "sha256_data"), blank_seals(outside), strict=False):
        model.metadata_props.add(key=key, value=value)
    write_file(model, path, outside)
    seal(path, path.with_name(f"{path.name}.data"))
    return _Written(made, params, free, feeds, tuple(named), tuple(named.values()), rows)


def _compare_on_cpu(
    path: Path, module: nn.Module, cases: Sequence[Inputs], tolerance: float | None, names: Sequence[str]
) -> None:
    """What another provider ran, by the one that every onnxruntime has, unless it lacks an operation or a type."""
    try:
        opened = session(path, (_CPU,))
    except ExportError:
        return
    compare(opened, module, cases, tolerance, names)


def verify_onnx(
    path: str | os.PathLike[str],
    module: nn.Module,
    example_inputs: ExampleInputs,
    *,
    batch_sizes: Sequence[int] = (1, 2, 5),
    providers: Sequence[Provider] | None = None,
    tolerance: float | None = None,
) -> tuple[str, tuple[Agreement, ...]]:
    """Run an ONNX file and compare every output with PyTorch's, on new rows of every batch size.

    Args:
        path: The file.
        module: The module that it was made from, or one that should compute the same.
        example_inputs: A tuple of positional arguments, a dict of keyword arguments, or the pair ``(args, kwargs)``.
        batch_sizes: The batch sizes to compare on.
        providers: Those of onnxruntime; by default CUDA where it works, else the CPU.
        tolerance: The largest error of a floating-point output as a share of its largest value, a hundredth of it being
            allowed absolutely; by default 1e-4 in float32, 5e-3 in float32 on CUDA (TF32) and 1e-2 in float16. Other
            outputs must be equal.

    Returns:
        The provider that ran the file, and how far every output is from PyTorch's on every batch.

    Raises:
        ExportError: Naming the output, the batch, the error and the tolerance, or saying why the file cannot be run.
    """
    check_batch_sizes(batch_sizes)
    _check_providers(providers)
    check_tolerance(tolerance)
    opened, plain = session(path, providers), _in_evaluation(module)
    agreements = compare(opened, plain, _cases(split_inputs(example_inputs), batch_sizes), tolerance)
    return opened.get_providers()[0], agreements


# The module as it is exported


def _in_evaluation(module: nn.Module) -> nn.Module:
    """In evaluation mode, with the module's own values and ordinary nodes in the place of its sites."""
    kind = type(module).__name__
    try:
        with quiet():
            twin = shell(unwrap(module))
    except CaptureError as error:
        raise ExportError(f"{kind} cannot be copied ({reason(error)}): make it support copy.deepcopy") from error
    for part in twin.modules():  # Hugging Face's: a file gives no cache of keys and values
        config: object = getattr(part, "config", None)
        if getattr(config, "use_cache", None) is True:
            vars(config)["use_cache"] = False
    try:
        twin.eval()
    except CaptureError as error:
        raise ExportError(f"{kind} cannot be exported to ONNX: {error}") from error
    except NotImplementedError:  # a graph made by torch.export, whose mode is in its nodes
        for part in twin.modules():
            part.training = False
    return inline_(twin) if holds_captured(twin) else twin


def _bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def _check_providers(providers: Sequence[Provider] | None) -> None:
    if isinstance(providers, str):
        raise ExportError(f"providers are a list: give [{providers!r}]")
    for each in providers or ():
        check_provider(each)


def check_opset(opset: int | None) -> None:
    """Raises ExportError for an opset that there is not."""
    import onnx

    newest = onnx.defs.onnx_opset_version()
    if opset is not None and not (is_whole(opset, 1) and opset <= newest):
        raise ExportError(f"there is no opset {opset!r}: this onnx knows 1 to {newest}")


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


def _cases(inputs: Inputs, batch_sizes: Sequence[int], limits: Sequence[int | None] = ()) -> list[Inputs]:
    """What to compare on: new rows at each batch size. limits: see ``with_batch``."""
    return [with_batch(inputs, batch, seed=batch, limits=limits) for batch in batch_sizes]


def _of_other_sizes(module: nn.Module, inputs: Inputs, written: _Written, *, required: bool) -> list[Inputs]:
    """The inputs at another size of each free dimension but the batch. required: whether each has to be compared."""
    sizes = other_sizes(module, written.shapes, inputs)
    known = sizes_in(written.shapes, inputs)
    cases = []
    for name, size in sizes.items():
        if size is None and required:
            size = known[name] + 1  # PyTorch will say what is wrong with it
        if size is not None and (required or name != "batch"):
            cases.append(with_sizes(written.shapes, inputs, {name: size}))
    return cases


def _and(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
