"""Measured times of training steps of single sites, dense against factored, where the net will train.

A step in LOW has fewer FLOPs, and is not always faster: thin products run at fewer FLOP/s, and two kernels start where
one did. So each site is run by itself, forward and backward, in turn with its dense form. What a site saves is then a
share of a step of the whole dense model, which is run too.
"""

from __future__ import annotations

import contextlib
import copy
import math
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn

from ..aliases import Output
from ..checks import check_compile, checked_path, compile_mode, is_whole
from ..errors import PlanError, first_line
from ..ops import EmbeddingOp, ProductOp
from ..randomness import random_state, set_random_state
from ..times_file import Times, cores, default_cache, key_of, read_times, write_times
from ..timing import Pair, device, interleaved, processor, threads_said
from ..tracing import ExampleInputs, Net, mapped, split_inputs, tensors, tensors_in
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
        compile: Whether it is compiled, or in which mode of torch.compile. Each shape is then compiled for the
            measurement too, which takes seconds.
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
    compile: bool | str = False
    inputs: ExampleInputs | None = None
    cache: Path | None = field(default_factory=default_cache)
    repeats: int = 15
    _known: Times = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.amp not in (None, torch.bfloat16, torch.float16):
            raise PlanError(f"amp is {self.amp!r}: give torch.bfloat16, torch.float16, or None for full precision")
        if not isinstance(self.dtype, torch.dtype) or not self.dtype.is_floating_point:
            raise PlanError(f"weights of dtype {self.dtype!r} do not train: give torch.float32 or the like")
        check_compile(PlanError, self.compile)
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
        return self._kept(self._key(rows), lambda: self._measured(rows))

    def whole(self, net: nn.Module, low: nn.Module, example_inputs: ExampleInputs) -> Pair | None:
        """Times of a step of the whole model, forward and backward, measured in turn or taken from the cache.

        Args:
            net: The net in FULL. Copies of both are run, in training mode.
            low: The same with every site in LOW.
            example_inputs: Those to run them on where ``inputs`` are not given.

        Returns:
            Seconds in FULL (first) and in LOW (second); None where nothing of the output has a gradient.

        Raises:
            PlanError: Where they cannot be run so.
        """
        inputs = example_inputs if self.inputs is None else self.inputs
        code = [str(net), *(str(module) for module in net.modules() if isinstance(module, Net))]
        weights = [[name, list(p.shape), p.requires_grad] for name, p in low.named_parameters()]
        given = [[str(t.dtype), list(t.shape)] for t in tensors(inputs)]
        key = key_of(["model", self._where(), code, weights, given])
        return self._kept(key, lambda: self._measured_whole(net, low, inputs))

    def _kept(self, key: str, measured: Callable[[], Pair | None]) -> Pair | None:
        if key not in self._known:
            pair = measured()
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
        how = compile_mode(self.compile) or ("compiled" if self.compile else "eager")
        return f"{where}{threads}, {kind}, {how}"

    def _key(self, rows: Sequence[PlannedSite]) -> str:
        uses = [[row.layout.name, row.site.shape, row.site.to_json()["uses"]] for row in rows]
        shared = [len(rows) > 1, rows[0].site.by_code, rows[0].rank]
        where, dtype = self._where()
        return key_of(["step", where, dtype, uses, shared])

    def _where(self) -> tuple[list[object], str]:
        """The machine, and the type of the weights."""
        known = [platform.node(), processor(), cores(), torch.get_num_threads(), str(torch.__version__), str(self)]
        return known, str(self.dtype)

    def _measured_whole(self, net: nn.Module, low: nn.Module, inputs: ExampleInputs) -> Pair | None:
        drawn = random_state()
        try:
            steps = [step for each in (net, low) if (step := self._whole_step(each, inputs)) is not None]
            if len(steps) < 2:
                return None
            once = interleaved(*steps, repeats=1)
            return interleaved(*steps, repeats=self.repeats, inner=_calls(once.first), warmup=1)
        except RuntimeError as error:
            raise PlanError(
                f"a training step of the whole model cannot be timed on {self} ({first_line(error)}): give StepTimes "
                "the device, the types and the inputs that it trains with"
            ) from error
        finally:
            set_random_state(drawn)

    def _whole_step(self, net: nn.Module, inputs: ExampleInputs) -> Callable[[], object] | None:
        """A call that runs a copy of the net forward and back, to its parameters; None where nothing leads back."""
        twin = copy.deepcopy(net).to(self.device, self.dtype)
        if not (isinstance(twin, Net) and twin.fixed_mode):
            twin.train()
        args, kwargs = mapped(self._placed, split_inputs(inputs))
        # Around captured parts the model's own code may break the graph.
        forward = self._compiled(twin, fullgraph=isinstance(twin, Net))
        trained = [parameter for parameter in twin.parameters() if parameter.requires_grad]

        def run() -> list[Tensor]:
            with self._autocast():
                output = forward(*args, **kwargs)
            return [each for each in tensors_in(output) if each.requires_grad]

        slopes = [torch.ones_like(each) for each in run()]
        return (lambda: torch.autograd.grad(run(), trained, slopes, allow_unused=True)) if slopes and trained else None

    def _placed(self, tensor: Tensor) -> Tensor:
        tensor = tensor.detach().clone()  # which the model may write to
        return tensor.to(self.device, self.dtype if tensor.is_floating_point() else None)

    def _compiled(self, forward: Callable[..., Output], fullgraph: bool) -> Callable[..., Output]:
        mode = compile_mode(self.compile)
        return torch.compile(forward, fullgraph=fullgraph, dynamic=False, mode=mode) if self.compile else forward

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        kind = torch.device(self.device).type
        return contextlib.nullcontext() if self.amp is None else torch.autocast(kind, self.amp)

    def _measured(self, rows: Sequence[PlannedSite]) -> Pair | None:
        if any(use.input_shape is None or not _known(use.op) for row in rows for use in row.site.uses):
            return None
        steps = [self._step(rows, factored) for factored in (False, True)]
        once = interleaved(*steps, repeats=3)
        return interleaved(*steps, repeats=self.repeats, inner=_calls(once.first))

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
        forward: Forward = self._compiled(_forward(rows, factored), fullgraph=True)
        trained = [*{id(x): x for x in inputs if x.requires_grad}.values(), *weights]

        def run() -> list[Tensor]:
            with self._autocast():
                return forward(inputs, weights)

        slopes = [torch.ones_like(each) for each in run()]
        return lambda: torch.autograd.grad(run(), trained, slopes, allow_unused=True)


def _calls(seconds: float) -> int:
    """How many calls of so long make one measurement."""
    return max(1, min(200, round(_SECONDS / max(seconds, 1e-7))))


def _known(op: object) -> bool:
    return not (isinstance(op, ProductOp) and op.view.gathered)


def _shapes(row: PlannedSite, factored: bool) -> tuple[tuple[int, ...], ...]:
    """Of the weight, or of the factors that are the site's own."""
    if not factored:
        return (tuple(row.site.shape),)
    return tuple(map(tuple, row.layout.factor_shapes(row.site.shape, row.rank)[: len(row.factor_names)]))


def _forward(rows: Sequence[PlannedSite], factored: bool) -> Forward:
    # Before it is compiled: what the layouts and the ops do here is no matter of torch.compile.
    counts = [len(_shapes(row, factored)) for row in rows]
    stages = [[row.layout.stages(use.op, row.rank) if factored else () for use in row.site.uses] for row in rows]

    def forward(inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
        outputs: list[Tensor] = []
        others: list[Tensor] = []
        given, left = iter(inputs), list(weights)
        stem: Tensor | None = None
        for row, count, ways in zip(rows, counts, stages, strict=True):
            own = [left.pop(0) for _ in range(count)]
            others = others if row.shares_right else own[1:]
            for use, way in zip(row.site.uses, ways, strict=True):
                x = next(given)
                if not factored:
                    outputs.append(use.op(x, own[0], None, None))
                    continue
                factors = (own[0], *others)
                if row.takes_product and stem is not None:
                    x, way = stem, way[1:]
                for number, (op, index) in enumerate(way):
                    x = op(x, factors[index], None, None)
                    if number == 0 and not row.shares_right:
                        stem = x
                outputs.append(x)
        return outputs

    # Dynamo counts recompilations by code objects, and refuses from a limit on: each site is to have one of its own.
    forward.__code__ = forward.__code__.replace()
    return forward
