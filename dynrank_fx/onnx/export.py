"""ONNX files that agreed with PyTorch before they got their name.

The file is written beside its place, checked there, run by onnxruntime on several batch sizes, and only then moved.
Weights are stored once, as they are: no product of factors is folded into a dense matrix.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from torch import nn

from ..aliases import JsonObject, Kwargs
from ..checks import check_flags, checked_path, is_list, is_whole, names_of
from ..errors import CaptureError, ExportError, reason
from ..rewrite import holds_captured, inline_
from ..tracing import (
    DynamicShapes,
    ExampleInputs,
    Inputs,
    as_dicts,
    batch_size,
    check_shapes,
    in_order,
    infinite_statistic,
    quiet,
    shapes_by_argument,
    shell,
    split_inputs,
    unwrap,
    with_batch,
)
from .agreement import Agreement, check_batch_sizes, check_tolerance, compare
from .convert import RestrictedError
from .draft import MAX_BYTES, Draft, Written, bytes_of, write_draft
from .dynamic import (
    Dynamic,
    Shape,
    bounds_in,
    named_shapes,
    names_of_dims,
    other_sizes,
    sizes_in,
    with_sizes,
    without_names,
)
from .file import check_file, check_place, replacing_file
from .precision import Precision
from .session import Provider, check_provider, elsewhere, session

_CPU = "CPUExecutionProvider"


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
        elsewhere: How many nodes another provider ran than ``provider``, by their operation; those that compute with
            shapes run on the CPU beside any.
        stacks: How many right factors were merged into one weight and one product, by the name of that weight.
    """

    path: Path
    provider: str
    opset: int
    file_size: int
    params: int
    dynamic_batch: bool
    agreements: tuple[Agreement, ...]
    shapes: Mapping[str, Shape] = field(default_factory=dict)
    elsewhere: Mapping[str, int] = field(default_factory=dict)
    stacks: Mapping[str, int] = field(default_factory=dict)

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
        others = ", ".join(f"{count} {kind}" for kind, count in self.elsewhere.items())
        products = "1 product" if len(self.stacks) == 1 else f"{len(self.stacks)} products"
        return (
            f"{self.path}: {size}, opset {self.opset}, {batch}; agrees with PyTorch on "
            f"batch{'es' if len(batches) > 1 else ''} {', '.join(map(str, batches))} "
            f"(largest error {worst_abs:.2g} absolute, {worst_rel:.2g} relative), run by {self.provider}"
            + (f", but for {others}" if others else "")
            + (f"; {sum(self.stacks.values())} right factors merged into {products}" if self.stacks else "")
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
    stacked: bool = True,
) -> ExportReport:
    """Write a module, in evaluation mode, to an ONNX file that onnxruntime agrees with.

    The file gets its name only after onnxruntime has run it and agreed with PyTorch. Where the model fixes its batch,
    the report says so and that batch alone is compared.

    Args:
        module: An ``nn.Module``; a net of ``transform`` is exported in its present phases.
        example_inputs: A tuple of positional arguments, a dict of keyword arguments, or the pair ``(args, kwargs)``.
        path: The file to write.
        opset: The version of ONNX's operators; by default what torch's exporter takes.
        dynamic_shapes: As in ``torch.export``; a ``Dim`` gives its name, and may be one of which the model takes some
            sizes alone, such as multiples of 4. By default every dimension that the model leaves free is free, under
            one name in all inputs (``batch``, ``sequence``, ``height`` and so on), and is compared at another size too.
        dynamic: In its place, free dimensions by argument, under a name, such as ``{"x": {0: "batch"}}``. A tensor
            inside an argument has the names of both, ``batch_ids`` for ``batch["ids"]``.
        input_names: Names for the file's inputs, in order; by default those of the arguments.
        output_names: Names for its outputs, in order; by default ``output`` or what the model calls them.
        precision: The types that its numbers are stored and multiplied in; it is compared with the module as it is.
        external_data: Whether weights go into a file of their own, ``path`` with ``.data`` added; by default where one
            file cannot hold them.
        batch_sizes: The batch sizes to compare on.
        more_inputs: Real inputs to compare on besides, each as ``example_inputs``; where the batch is fixed, as many of
            their rows as that takes, over again if they are fewer.
        providers: Those of onnxruntime; by default CUDA where it works, else the CPU. Where another than the CPU ran,
            the CPU is compared too.
        tolerance: The largest error that is allowed; see ``verify_onnx``.
        metadata: More entries for the file's ``metadata_props``.
        stacked: Whether the right factors of linear layers that read one value, such as query, key and value, become
            one weight and one product, of which each left factor takes its part. Outputs stay up to rounding; the
            weight is called after all of them, ``{query,key,value}.right.weight``.

    Returns:
        What was written and compared.

    Raises:
        ExportError: Where the file cannot be made or does not agree; there is then no new file, and one that was there
            is as it was.
        CaptureError: For inputs or dynamic shapes that are none.
    """
    check_batch_sizes(batch_sizes)
    _check_providers(providers)
    check_tolerance(tolerance)
    check_opset(opset)
    check_place(checked_path(path))
    if Path(path).suffix != ".onnx":
        raise ExportError(f"{path} is no name of an ONNX file: give one that ends in .onnx")
    for names in (input_names, output_names):
        if not is_list(names) or not all(isinstance(name, str) for name in names):
            raise ExportError(f"{names!r} are no names of inputs or outputs: give a list of texts")
    if not is_list(more_inputs):
        raise ExportError(f"more_inputs are a list of inputs, not {more_inputs!r}")
    check_flags(ExportError, stacked=stacked)
    if external_data is not None:
        check_flags(ExportError, external_data=external_data)
    if metadata is not None and not isinstance(metadata, Mapping):
        raise ExportError(f"metadata are texts by name, not {metadata!r}")
    for key, value in (metadata or {}).items():
        if not (isinstance(key, str) and isinstance(value, str)):
            raise ExportError(f"metadata are texts by name, not {key!r}: {value!r}; write it as a text")
    check_shapes(dynamic_shapes)
    plain = _in_evaluation(module)
    if (what := infinite_statistic(plain)) is not None:
        raise ExportError(
            f"{what} is not finite, as after a training that has diverged: load sound weights, or give the batch norms "
            "new statistics by recalibrate_"
        )
    inputs = in_order(plain, as_dicts(split_inputs(example_inputs)))
    large = bytes_of(plain) > MAX_BYTES
    if large and external_data is False:
        raise ExportError(
            f"{type(module).__name__} has {bytes_of(plain) / 1e9:.1f} GB of weights and one ONNX file holds "
            "2 GB: leave external_data out"
        )
    if not isinstance(precision, Precision):
        raise ExportError(f"{precision!r} is no precision of a file: give one of {names_of(Precision)}")
    if dynamic is not None and dynamic_shapes is not None:
        raise ExportError("give dynamic or dynamic_shapes, not both: they say the same")
    shapes: Kwargs | None = None
    free, bounds = dynamic, dict[str, range]()
    if dynamic is not None:
        shapes = named_shapes(plain, inputs, dynamic)
    elif dynamic_shapes is not None:
        shapes = shapes_by_argument(plain, inputs, dynamic_shapes)
        free, bounds = names_of_dims(plain, inputs, shapes), bounds_in(shapes)
    draft = Draft(opset, shapes, free, input_names, output_names, precision, external_data, metadata or {}, stacked)
    allowed = precision.tolerance if tolerance is None else tolerance

    def made(draft: Draft, *, only_batch: bool, required: bool) -> ExportReport:
        with replacing_file(Path(path)) as beside:
            written = write_draft(beside, plain, inputs, draft, only_batch=only_batch)
            try:
                check_file(beside, precision)
                limits = [written.rows.get(name) for name in written.feeds]
                sizes = _batches(batch_sizes, inputs, written, bounds) if written.free else (batch_size(inputs) or 1,)
                cases = _cases(inputs, sizes, limits)
                cases += _of_other_sizes(plain, inputs, written, bounds, required=required)
                cases += [_as_large(as_dicts(split_inputs(each)), written, inputs) for each in more_inputs]
                opened = session(beside, providers)
                agreements = compare(opened, plain, cases, allowed, written.feeds)
                provider, others = opened.get_providers()[0], elsewhere(opened)
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
            others,
            written.stacks,
        )

    if shapes is None:
        with contextlib.suppress(_TooFreeError):
            return made(draft, only_batch=False, required=False)
    if shapes is not None and dynamic is None and free:
        with contextlib.suppress(RestrictedError):
            return made(draft, only_batch=True, required=False)
        # A size that is computed from another cannot be tried without it.
        derived = any(not name.isidentifier() for axes in free.values() for name in axes.values())
        return made(replace(draft, shapes=without_names(shapes)), only_batch=True, required=not derived)
    return made(draft, only_batch=True, required=dynamic is not None)


class _TooFreeError(ExportError):
    """A file of which more than the batch is free, without having been asked for, does not serve."""


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


def _check_providers(providers: Sequence[Provider] | None) -> None:
    if providers is not None and not is_list(providers):
        raise ExportError(f"providers are a list: give [{providers!r}]")
    for each in providers or ():
        check_provider(each)


def check_opset(opset: int | None) -> None:
    """Raises ExportError for an opset that there is not."""
    import onnx

    newest = onnx.defs.onnx_opset_version()
    if opset is not None and not (is_whole(opset, 1) and opset <= newest):
        raise ExportError(f"there is no opset {opset!r}: this onnx knows 1 to {newest}")


def _cases(inputs: Inputs, batch_sizes: Sequence[int], limits: Sequence[int | None] = ()) -> list[Inputs]:
    """What to compare on: new rows at each batch size. limits: see ``with_batch``."""
    return [with_batch(inputs, batch, seed=batch, limits=limits) for batch in batch_sizes]


def _as_large(real: Inputs, written: Written, inputs: Inputs) -> Inputs:
    """Real inputs, with as many rows as a file takes whose batch is fixed."""
    batch = batch_size(inputs)
    return real if written.free or batch is None else with_batch(real, batch)


def _batches(
    batch_sizes: Sequence[int], inputs: Inputs, written: Written, bounds: Mapping[str, range]
) -> Sequence[int]:
    """Those that the bounds of a batch's dimension allow; the example's where they allow none."""
    names = {shape[0] for shape in written.shapes if shape}
    allowed = [bounds[name] for name in bounds if name in names]
    return [size for size in batch_sizes if all(size in each for each in allowed)] or [batch_size(inputs) or 1]


def _of_other_sizes(
    module: nn.Module, inputs: Inputs, written: Written, bounds: Mapping[str, range], *, required: bool
) -> list[Inputs]:
    """The inputs at another size of each free dimension but the batch. required: whether each has to be compared."""
    sizes = other_sizes(module, written.shapes, inputs, bounds)
    known = sizes_in(written.shapes, inputs)
    cases = []
    for name, size in sizes.items():
        if size is None and required and known[name] + 1 in bounds.get(name, [known[name] + 1]):
            size = known[name] + 1  # PyTorch will say what is wrong with it
        if size is not None and (required or name != "batch"):
            cases.append(with_sizes(written.shapes, inputs, {name: size}))
    return cases


def _and(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
