"""Measured times of whole models in onnxruntime, each in turn with the dense one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import nn

from ..errors import ExportError
from ..onnx import Precision, bound, cast, converted, onnx_inputs, session_of
from ..processes import ALONE, Processes
from ..timing import Pair, interleaved
from ..tracing import ExampleInputs, in_order, split_inputs
from .site_times import SiteTimes

_ROUNDS = 3  # the one of the median ratio counts: a busy moment spoils one of them
_SECONDS, _SLOW = 2e-3, 2e-2  # so long at least is one measurement; what takes longer is measured less often


class ModelTimes:
    """Times on the target of ``sites``, at the shapes of the example inputs. Of several processes the first measures,
    while the others wait, and tells them.

    dense: seconds of the dense model; None where it does not become an ONNX file, and ``why`` then says why. Raises
    ExportError for a provider that does not come up.
    """

    def __init__(
        self, dense: nn.Module, example_inputs: ExampleInputs, sites: SiteTimes, processes: Processes = ALONE
    ) -> None:
        self.sites = sites
        self._module, self._inputs, self._processes = dense, split_inputs(example_inputs), processes
        self.dense: float | None
        self.dense, self.why = processes.from_one(0, self._of_dense, ExportError, "timing the dense model")

    def _of_dense(self) -> tuple[float | None, str]:
        try:
            model = self._onnx(self._module)
        except ExportError as error:
            return None, str(error)
        self._run_dense = self._runner(model)
        return interleaved(self._run_dense, self._run_dense, repeats=11).first, ""

    def pair(self, module: nn.Module) -> Pair | None:
        """The dense model (first) and another (second); None where the dense one cannot be run."""
        if self.dense is None:
            return None
        return self._processes.from_one(0, lambda: self._pair(module), ExportError, "timing the model")

    def _pair(self, module: nn.Module) -> Pair:
        assert self.dense is not None
        run = self._runner(self._onnx(module))
        inner = max(1, min(50, round(_SECONDS / self.dense)))
        repeats = 15 if self.dense < _SLOW else 5
        rounds = [interleaved(self._run_dense, run, repeats=repeats, inner=inner) for _ in range(_ROUNDS)]
        rounds.sort(key=lambda pair: pair.ratio)
        return replace(rounds[_ROUNDS // 2], spread=(rounds[0].ratio, rounds[-1].ratio))

    def _onnx(self, module: nn.Module) -> bytes:
        made = cast(module, Precision(self.sites.element))
        model, _ = converted(made, in_order(module, self._inputs), None, None)
        try:
            serialized: bytes = model.SerializeToString()
        except ValueError as error:
            raise ExportError("it is too large for one file (2 GB)") from error
        return serialized

    def _runner(self, model: bytes) -> Callable[[], None]:
        session = session_of(model, self.sites.provider)
        args, kwargs = in_order(self._module, self._inputs)
        run: Callable[[], None] = bound(session, onnx_inputs(session, args, kwargs))
        return run
