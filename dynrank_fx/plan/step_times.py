"""Measured times of training steps of single sites, dense against factored, where the net will train.

A step in LOW has fewer FLOPs, and is not always faster: thin products run at fewer FLOP/s, and two kernels start where
one did. So each site is run by itself, forward and backward, in turn with its dense form.
"""

from __future__ import annotations

import contextlib
import math
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from ..checks import check_flags, checked_path, is_whole
from ..errors import PlanError, first_line
from ..ops import EmbeddingOp, ProductOp
from ..times_file import Times, cores, default_cache, key_of, read_times, write_times
from ..timing import Pair, device, interleaved, processor, threads_said
from ..tracing import ExampleInputs
from .plan import PlannedSite

_SECONDS = 1e-3  # so long at least is one measurement

Forward: TypeAlias = Callable[[Sequence[Tensor], Sequence[Tensor]], list[Tensor]]
"""Inputs and weights of all uses to their outputs."""


@dataclass
class StepTimes:
    """Measured times of single sites in a training step on this machine, forward and backward, kept in a file.

    Attributes:
        device: Where the net trains, as torch names it.
        dtype: Of its weights.
        amp: What it autocasts to: ``torch.bfloat16``, ``torch.float16``, or None.
        compile: Whether it is compiled. Each shape is then compiled for the measurement too, which takes seconds.
        inputs: The model's inputs in a batch of the training, by default the example inputs: what a site costs depends
            on how much there is to do in a step.
        cache: The file; its entries are keyed by machine, versions, types and shapes. None for no file.
        repeats: How many measurements of each, of which the median counts.

    Raises:
        PlanError: For a device that cannot be used, and for a value that is none of these.
    """

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    amp: torch.dtype | None = None
    compile: bool = False
    inputs: ExampleInputs | None = None
    cache: Path | None = field(default_factory=default_cache)
    repeats: int = 15
    _known: Times = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.amp not in (None, torch.bfloat16, torch.float16):
            raise PlanError(f"amp is {self.amp!r}: give torch.bfloat16, torch.float16, or None for full precision")
        if not isinstance(self.dtype, torch.dtype) or not self.dtype.is_floating_point:
            raise PlanError(f"weights of dtype {self.dtype!r} do not train: give torch.float32 or the like")
        check_flags(PlanError, compile=self.compile)
        if not is_whole(self.repeats, 1):
            raise PlanError(f"{self.repeats!r} repeats measure nothing: give a whole number of 1 or more")
        if self.inputs is not None and not isinstance(self.inputs, tuple | list | dict):
            raise PlanError(f"inputs is {self.inputs!r}: give the model's inputs as a tuple or a dict, or leave it out")
        try:
            torch.zeros(1, device=torch.device(self.device))
        except (RuntimeError, AssertionError, TypeError, ValueError, ImportError) as error:
            raise PlanError(f"nothing can be timed on the device {self.device!r} ({first_line(error)})") from error
        self.cache = None if self.cache is None else checked_path(self.cache)
        self._known = read_times(self.cache)

    def pair(self, rows: Sequence[PlannedSite]) -> Pair | None:
        """Times of a site, dense and factored, measured in turn or taken from the cache.

        Args:
            rows: The row of the plan, or those of the sites that share a factor.

        Returns:
            Dense (first) and factored (second) seconds; None where the site cannot be run by itself.
        """
        key = self._key(rows)
        if key not in self._known:
            pair = self._measured(rows)
            self._known[key] = None if pair is None else [pair.first, pair.second, pair.ratio]
        values = self._known[key]
        return None if values is None else Pair(values[0], values[1], values[2])

    def save(self) -> None:
        """Write the cache, whole or not at all; without a word where the disk does not let it."""
        write_times(self.cache, self._known)

    def __str__(self) -> str:
        """On what is measured, in a line."""
        where = device() if torch.device(self.device).type == "cuda" else processor()
        kind = str(self.amp or self.dtype).removeprefix("torch.")
        threads = "" if torch.device(self.device).type == "cuda" else f", {threads_said(torch.get_num_threads())}"
        return f"{where}{threads}, {kind}, {'compiled' if self.compile else 'eager'}"

    def _key(self, rows: Sequence[PlannedSite]) -> str:
        uses = [[row.layout.name, row.site.shape, row.site.to_json()["uses"]] for row in rows]
        shared = [len(rows) > 1, rows[0].site.by_code, rows[0].rank]
        where = [platform.node(), processor(), cores(), torch.get_num_threads(), str(torch.__version__), str(self)]
        return key_of(["step", where, str(self.dtype), uses, shared])

    def _measured(self, rows: Sequence[PlannedSite]) -> Pair | None:
        if any(use.input_shape is None or not _known(use.op) for row in rows for use in row.site.uses):
            return None
        steps = [self._step(rows, factored) for factored in (False, True)]
        once = interleaved(*steps, repeats=3)
        inner = max(1, min(200, round(_SECONDS / max(once.first, 1e-7))))
        return interleaved(*steps, repeats=self.repeats, inner=inner)

    def _step(self, rows: Sequence[PlannedSite], factored: bool) -> Callable[[], object]:
        """A call that runs the uses of the sites forward and back, to their inputs and weights."""
        generator = torch.Generator().manual_seed(0)

        def numbers(shape: Sequence[int]) -> Tensor:
            values = torch.randn(tuple(shape), generator=generator) / math.sqrt(max(shape[-1:], default=1) or 1)
            return values.to(self.device, self.dtype).requires_grad_()

        inputs: list[Tensor] = []
        for row in rows:
            for use in row.site.uses:
                shape = use.input_shape
                assert shape is not None
                if isinstance(use.op, EmbeddingOp):
                    count = use.op.view.shape(row.site.shape)[0]
                    inputs.append(torch.randint(count, shape, generator=generator).to(self.device))
                else:
                    inputs.append(numbers(shape))
        if len(rows) > 1:
            inputs = inputs[:1] * len(inputs)  # which is why they share a factor
        shapes = [_shapes(row, factored) for row in rows]
        weights = [numbers(shape) for each in shapes for shape in each]
        forward: Forward = _forward(rows, factored)
        if self.compile:
            forward = torch.compile(forward, fullgraph=True, dynamic=False)
        kind = torch.device(self.device).type
        trained = [*{id(x): x for x in inputs if x.requires_grad}.values(), *weights]

        def run() -> list[Tensor]:
            amp = torch.autocast(kind, self.amp) if self.amp is not None else contextlib.nullcontext()
            with amp:
                return forward(inputs, weights)

        slopes = [torch.ones_like(each) for each in run()]
        return lambda: torch.autograd.grad(run(), trained, slopes, allow_unused=True)


def _known(op: object) -> bool:
    return not (isinstance(op, ProductOp) and op.view.gathered)


def _shapes(row: PlannedSite, factored: bool) -> tuple[tuple[int, ...], ...]:
    """Of the weight, or of the factors that are the site's own."""
    if not factored:
        return (tuple(row.site.shape),)
    return tuple(map(tuple, row.layout.factor_shapes(row.site.shape, row.rank)[: len(row.factor_names)]))


def _forward(rows: Sequence[PlannedSite], factored: bool) -> Forward:
    def forward(inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
        outputs, given, left = list[Tensor](), iter(inputs), list(weights)
        others: list[Tensor] = []
        stem: Tensor | None = None
        for row in rows:
            own = [left.pop(0) for _ in _shapes(row, factored)]
            others = others if row.shares_right else own[1:]
            for use in row.site.uses:
                x = next(given)
                if not factored:
                    outputs.append(use.op(x, own[0], None, None))
                    continue
                factors = (own[0], *others)
                stages = row.layout.stages(use.op, row.rank)
                if row.takes_product and stem is not None:
                    x, stages = stem, stages[1:]
                for number, (op, index) in enumerate(stages):
                    x = op(x, factors[index], None, None)
                    if number == 0 and not row.shares_right:
                        stem = x
                outputs.append(x)
        return outputs

    return forward
