"""``compress``: a trained model, dense or of phase training, made smaller or faster within a budget, and measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from .batches import call, checked_batches
from .bench import Pair, interleaved
from .budget import Budget
from .calibration import calibrate
from .errors import ExportError, PlanError
from .inlining import holds_captured, inline
from .inputs import in_order, split_inputs
from .moments import Calibration
from .net import unwrap
from .onnxcheck import onnx_inputs, session_of
from .onnxconvert import converted
from .phase import Phase
from .pipeline import transform
from .plan import Plan
from .precision import Precision, cast
from .ranks import RankPolicy, Ratio
from .recovery import Loss, distance, recalibrate_, recover_
from .reranking import rank_units
from .rewrite import plan_of
from .roles import Role
from .sitetimes import SiteTimes, bound
from .table import text_table
from .transition import enter_
from .truncation import Cut, a_twin, apply_ranks_, cut_plainly, ranks_of

_MARGINS = (0.0, 0.15, 0.35, 1.0)
"""How much faster than dense a site has to be, tried in turn until the whole model is no slower; at 1 all are dense."""
_PROBES = 4  # batches that tell what a site's errors do to the outputs
_NOISE = 0.02  # a ratio of times so near to 1 is not slower


@dataclass(frozen=True)
class MaxDrop:
    """The fewest parameters with which the metric falls by at most this much."""

    drop: float

    def __post_init__(self) -> None:
        if not 0 <= self.drop < math.inf:
            raise PlanError(f"a metric cannot fall by at most {self.drop}; give a number of 0 or more")


@dataclass(frozen=True)
class Compressed:
    """What ``compress`` made. module: ordinary torch, in evaluation mode. plan: ranks of the sites that are factored.

    flops: of dense and compressed on the example inputs. times: seconds of both in onnxruntime, measured in turn; None
    where the model cannot be run there. metrics: of both. notes: what the user should know, a sentence each.
    """

    module: nn.Module
    plan: Plan
    cuts: tuple[Cut, ...]
    params: tuple[int, int]
    flops: tuple[int, int] | None
    times: Pair | None
    metrics: tuple[float, float] | None
    notes: tuple[str, ...]

    def __str__(self) -> str:
        rows = []
        by_name = {row.site.name: row for row in self.plan.sites}
        for cut in self.cuts:
            row = by_name[cut.site]
            shape = "x".join(map(str, row.site.shape))
            params = row.site.params if cut.rank is None else replace(row, rank=cut.rank).params
            rank, error = ("dense", "") if cut.rank is None else (str(cut.rank), f"{cut.error:.3f}")
            rows.append((cut.site, shape, rank, f"{row.site.params:,} -> {params:,}", error))
        lines = [text_table(("weight", "shape", "rank", "parameters", "change of the weight"), rows, right=(2,)), ""]
        lines.append(f"parameters  {_change(*self.params)}")
        if self.flops is not None:
            lines.append(f"FLOPs       {_change(*self.flops)} on the example inputs")
        if self.times is not None:
            first, second = 1e3 * self.times.first, 1e3 * self.times.second
            lines.append(f"time        {first:.3f} -> {second:.3f} ms, {self.times.ratio:.2f} of dense, in onnxruntime")
        if self.metrics is not None:
            lines.append(f"metric      {self.metrics[0]:.4f} -> {self.metrics[1]:.4f}")
        return "\n".join((*lines, *self.notes))


def compress(
    model: nn.Module,
    example_inputs: Any,
    budget: RankPolicy | MaxDrop,
    calibration: Iterable[Any] | None = None,
    *,
    metric: Callable[[nn.Module], float] | None = None,
    recover_steps: int = 0,
    loss: Loss | None = None,
    times: SiteTimes | None = None,
    multiple_of: int = 1,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    leave: Collection[Role] = (),
    sequential: bool = False,
) -> Compressed:
    """Cut a trained model to a budget so that its outputs change least, and measure what became of it.

    model: any nn.Module, or a net of ``transform`` in any phase. budget: ``Budget(flops=0.5)`` and the like,
    ``MaxDrop(0.01)`` of ``metric`` (larger is better), or any rank policy. calibration: batches of inputs; without
    them the cut is a plain SVD. recover_steps: of fine-tuning towards the dense model's outputs, or by ``loss(output,
    number of the calibration batch)``. times: measures sites where the model is to run (the shapes are those of the
    example inputs); a site that is not faster factored stays dense, and the whole is never slower than the dense model,
    unless the budget is one of parameters. None to measure nothing. multiple_of: ranks are multiples of it. include,
    exclude, leave: as in ``make_plan``. sequential: as in ``truncate``.

    Raises PlanError for a budget that cannot be met (and says the least one that can), CalibrationError for data that
    do not serve; the model stays as it is.
    """
    data = None if calibration is None else checked_batches(calibration)
    if sequential and data is None:
        raise PlanError("to calibrate the sites one after the other takes calibration data: give batches")
    if recover_steps and data is None:
        raise PlanError("to recover takes calibration data: give batches, or leave the recovery out")
    if isinstance(budget, MaxDrop) and metric is None:
        raise PlanError("a budget of the metric's fall takes a metric: give metric=, a function of the module")
    net = _in_full(model, example_inputs, include, exclude, leave)
    dense = inline(net)
    known = None if data is None else calibrate(net, data)
    work = _Work(net, dense, example_inputs, data, known, times, multiple_of, recover_steps, loss, sequential)
    size_asked = isinstance(budget, Budget) and budget.params is not None
    if isinstance(budget, MaxDrop):
        assert metric is not None
        found = work.fit(lambda margin: _least(work, budget.drop, metric, margin))
    elif size_asked:
        found = work.result(work.candidate(budget, None))
    else:
        found = work.fit(lambda margin: work.candidate(budget, margin))
    if times is not None:
        times.save()
    metrics = None if metric is None else (_scored(metric, dense), _scored(metric, found.module))
    return replace(found, metrics=metrics)


def _in_full(
    model: nn.Module, example_inputs: Any, include: Sequence[str], exclude: Sequence[str], leave: Collection[Role]
) -> nn.Module:
    """The model as a net in evaluation mode, every site dense."""
    if holds_captured(unwrap(model)):
        net = a_twin(model)
    else:
        made = transform(
            model,
            example_inputs,
            rank=Ratio(0.25),
            include=include,
            exclude=exclude,
            leave=leave,
            allow_unprofitable=True,
        )
        net = a_twin(made)
    enter_(net, Phase.FULL)
    return net


@dataclass(frozen=True)
class _Candidate:
    module: nn.Module
    cuts: tuple[Cut, ...]


@dataclass
class _Work:
    """What all candidates share."""

    net: nn.Module
    dense: nn.Module
    example_inputs: Any
    data: list[Any] | None
    known: Calibration | None
    times: SiteTimes | None
    multiple_of: int
    recover_steps: int
    loss: Loss | None
    sequential: bool
    _dense_time: float | None = None
    _untimed: str = ""
    _weights: dict[str, float] | None = None

    def candidate(self, policy: RankPolicy, margin: float | None) -> _Candidate:
        """The model by a policy. margin: see ``rank_units``; None where a site need not be faster."""
        twin = a_twin(self.net)
        total = self.dense_time() if self.times is not None else None
        times = self.times
        timing = None if times is None or total is None else lambda rows: times.cost(rows, total)
        spectrum = None if self.known is None else self.known.spectrum
        weights = self.weights() if isinstance(policy, Budget) else {}
        units = rank_units(
            twin,
            multiple_of=self.multiple_of,
            spectrum=spectrum,
            timing=timing,
            margin=margin,
            weights=weights,
        )
        ranks = ranks_of(twin, policy, self.known, units)
        cuts = apply_ranks_(twin, ranks, self.known, self.data if self.sequential else None)
        module = inline(twin)
        if self.data is not None and any(cut.error > 0 for cut in cuts):
            recalibrate_(module, self.data)
            if self.recover_steps:
                recover_(module, self.dense, self.data, self.recover_steps, loss=self.loss)
        return _Candidate(module, tuple(cuts))

    def weights(self) -> dict[str, float]:
        """What each site's errors do to the model's outputs: measured with that site alone cut to a quarter of its
        rank, over the share of its own outputs that this takes away.
        """
        if self._weights is None:
            self._weights = {}
            if self.data is not None and self.known is not None:
                some = self.data[:_PROBES]
                for unit in rank_units(self.net, spectrum=self.known.spectrum):
                    energy = unit.curve.spectrum().square().sum(0)
                    rank = max(1, unit.curve.max_rank // 4)
                    lost = float(energy[rank:].sum() / energy.sum().clamp_min(1e-30))
                    moved = self._moved(unit.names, rank, some)
                    self._weights[unit.names[0]] = moved / max(lost, 1e-6)
        return self._weights

    @torch.no_grad()
    def _moved(self, names: Sequence[str], rank: int, some: list[Any]) -> float:
        twin = a_twin(self.net)
        ranks = {row.site.name: rank if row.site.name in names else None for row in plan_of(twin).sites}
        apply_ranks_(twin, ranks, self.known)
        module = inline(twin)
        recalibrate_(module, some)
        return sum(float(distance(call(module, b, i), call(self.dense, b, i))) for i, b in enumerate(some)) / len(some)

    def fit(self, make: Callable[[float | None], _Candidate]) -> Compressed:
        """The first candidate that is not slower than the dense model, by rising margins."""
        if self.times is None or self.dense_time() is None:
            return self.result(make(None))
        notes: list[str] = []
        for margin in _MARGINS:
            try:
                found = self.result(make(margin))
            except PlanError as error:
                raise PlanError(
                    f"{error}. Only layers that are faster than dense count here; a budget of parameters asks for size "
                    "alone"
                ) from error
            assert found.times is not None
            if margin == _MARGINS[-1] or found.times.ratio <= 1 + _NOISE:
                break
            notes = [
                f"The whole model took {found.times.ratio:.2f} of the dense one's time with every site that is faster "
                "by itself, so that those least faster stayed dense."
            ]
        return replace(found, notes=(*found.notes, *notes))

    def result(self, candidate: _Candidate) -> Compressed:
        plan = plan_of(self.net)
        ranks = {cut.site: cut.rank for cut in candidate.cuts}
        low = [replace(row, rank=rank) for row in plan.sites if (rank := ranks[row.site.name]) is not None]
        params = sum(p.numel() for p in candidate.module.parameters())
        flops = None
        if plan.total_flops is not None:
            flops = plan.total_flops, plan.total_flops + sum((row.flops or 0) - (row.site.flops or 0) for row in low)
        times = None if self.times is None or self.dense_time() is None else self._compared(candidate.module)
        made = plan.with_ranks({name: rank for name, rank in ranks.items() if rank is not None})
        notes = self._notes(candidate, times)
        return Compressed(
            candidate.module, made, candidate.cuts, (plan.total_params, params), flops, times, None, notes
        )

    def _notes(self, candidate: _Candidate, times: Pair | None) -> tuple[str, ...]:
        notes = [f"{sentence}." for sentence in cut_plainly(candidate.cuts)]
        dense = [cut.site for cut in candidate.cuts if cut.rank is None]
        if dense and times is not None:
            notes.append(
                f"{len(dense)} of {len(candidate.cuts)} sites are dense, where factors are not faster or "
                "the budget leaves room."
            )
        if times is not None and times.ratio > 1 + _NOISE and len(dense) < len(candidate.cuts):
            notes.append(
                f"It is slower than the dense model ({times.ratio:.2f} of its time): a budget of parameters "
                "asks for size alone; latency=1 asks for speed."
            )
        if self.times is not None and times is None:
            notes.append(f"Nothing was timed, since the dense model does not become an ONNX file: {self._untimed}")
        return tuple(notes)

    def dense_time(self) -> float | None:
        """Seconds of the dense model in onnxruntime; None where it cannot be run there."""
        if self._dense_time is None:
            try:
                model = self._onnx(self.dense)
            except ExportError as error:
                self._dense_time, self._untimed = math.nan, str(error)
            else:
                self._run_dense = self._runner(model)
                self._dense_time = interleaved(self._run_dense, self._run_dense, repeats=11).first
        return None if math.isnan(self._dense_time) else self._dense_time

    def _compared(self, module: nn.Module) -> Pair | None:
        return interleaved(self._run_dense, self._runner(self._onnx(module)), repeats=31)

    def _onnx(self, module: nn.Module) -> bytes:
        assert self.times is not None
        inputs = in_order(module, split_inputs(self.example_inputs))
        model, _ = converted(cast(module, Precision(self.times.element)), inputs, None, None)
        serialized: bytes = model.SerializeToString()
        return serialized

    def _runner(self, model: bytes) -> Callable[[], None]:
        assert self.times is not None
        session = session_of(model, self.times.provider)
        args, kwargs = in_order(self.dense, split_inputs(self.example_inputs))
        run: Callable[[], None] = bound(session, onnx_inputs(session, args, kwargs))
        return run


def _least(work: _Work, drop: float, metric: Callable[[nn.Module], float], margin: float | None) -> _Candidate:
    """The candidate of fewest parameters whose metric is within the drop, by bisection of the budget."""
    wanted = _scored(metric, work.dense) - drop
    low, high, best = 0.0, 1.0, work.candidate(Budget(params=1.0), margin)
    for _ in range(8):
        share = (low + high) / 2
        try:
            found = work.candidate(Budget(params=share), margin)
        except PlanError:  # rank 1 everywhere is still larger
            low = share
            continue
        if metric(found.module) >= wanted:  # not where it is no number
            high, best = share, found
        else:
            low = share
    return best


def _scored(metric: Callable[[nn.Module], float], module: nn.Module) -> float:
    value = float(metric(module))
    if not math.isfinite(value):
        raise PlanError(f"the metric is {value}, which nothing can be compared with: see that it is a finite number")
    return value


def _change(before: int, after: int) -> str:
    return f"{before:,} -> {after:,} ({after / before:.1%} of dense)" if before else "0"
