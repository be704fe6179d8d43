"""How long a file takes beside another form of the same model, such as the one whose weights are dense."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from torch import nn

from ..aliases import JsonObject
from ..errors import ExportError
from ..timing import interleaved
from ..tracing import ExampleInputs, as_dicts, batch_size, in_order, split_inputs
from .agreement import onnx_inputs
from .convert import converted
from .draft import MAX_BYTES, bytes_of
from .precision import Precision, cast, int8_weights_
from .session import Provider, Session, bound, session, session_of

_SECONDS = 2.0  # that all runs may take, about
_LEAST, _MOST = 3, 31  # pairs of measurements
_SHORT = 2e-3  # so long at least is one measurement


@dataclass(frozen=True)
class Beside:
    """A file and another form of its model, run in turn.

    Attributes:
        file: The file.
        provider: The provider of onnxruntime that ran both.
        batch: Of the inputs; None where they have none.
        seconds: The median time of the file.
        other_seconds: That of the other form.
        ratio: The median of neighbouring pairs, the file over the other.
        spread: The ratio that a tenth of the pairs is below, and the one that a tenth is above.
    """

    file: Path
    provider: str
    batch: int | None
    seconds: float
    other_seconds: float
    ratio: float
    spread: tuple[float, float]

    @property
    def slower(self) -> bool:
        """Whether the file is slower in all but a tenth of the pairs: what is nearer than that may be chance."""
        return self.spread[0] > 1

    def to_json(self) -> JsonObject:
        """The figures as JSON values.

        Returns:
            A dict, with the file's path as text.
        """
        return {**asdict(self), "file": str(self.file)}

    def __str__(self) -> str:
        batch = "" if self.batch is None else f"batch {self.batch}, "
        return (
            f"{self.file} takes {self.ratio:.2f} of the time of the same model with dense weights "
            f"({batch}{self.provider})"
        )


def time_beside(
    path: str | os.PathLike[str],
    dense: nn.Module,
    example_inputs: ExampleInputs,
    *,
    opset: int | None = None,
    precision: Precision = Precision.FLOAT32,
    provider: Provider | None = None,
) -> Beside:
    """Run a file and the same model with dense weights in turn, at the sizes of the example inputs.

    Args:
        path: The file.
        dense: The model with dense weights, as plain torch in evaluation mode.
        example_inputs: As for ``export_onnx``.
        opset: That of the file.
        precision: That of the file.
        provider: By default CUDA where it works, else the CPU.

    Returns:
        Times and their ratio, of about two seconds of runs.

    Raises:
        ExportError: For a dense model that cannot be run so, such as one too large for one file.
    """
    if bytes_of(dense) > MAX_BYTES:
        raise ExportError(f"with dense weights it has {bytes_of(dense) / 1e9:.1f} GB, and is not run from memory")
    inputs = in_order(dense, as_dicts(split_inputs(example_inputs)))
    model, _ = converted(cast(dense, precision), inputs, None, opset)
    if precision is Precision.INT8_WEIGHTS:
        int8_weights_(model)
    opened = session(path, None if provider is None else [provider])
    ran = opened.get_providers()[0]
    other = session_of(model.SerializeToString(), ran if provider is None else provider)
    feeds = onnx_inputs(other, *inputs)
    calls = _call(other, list(feeds.values())), _call(opened, list(feeds.values()))
    once = interleaved(*calls, repeats=1, warmup=1)
    inner = max(1, round(_SHORT / max(once.first, 1e-7)))
    repeats = round(_SECONDS / inner / max(once.first + once.second, 1e-7))
    pair = interleaved(*calls, repeats=min(_MOST, max(_LEAST, repeats)), inner=inner, warmup=0)
    assert pair.spread is not None
    return Beside(Path(path), ran, batch_size(inputs), pair.second, pair.first, pair.ratio, pair.spread)


def _call(opened: Session, values: list[np.ndarray]) -> Callable[[], None]:
    """A run on these values, input by input: two files of one model may call them by other names."""
    names = [each.name for each in opened.get_inputs()]
    if len(names) != len(values):
        raise ExportError(f"it takes {len(values)} inputs with dense weights, and the file {len(names)}")
    return bound(opened, dict(zip(names, values, strict=True)))
