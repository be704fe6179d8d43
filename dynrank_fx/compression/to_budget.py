"""``compress``: a trained model, dense or of phase training, made smaller or faster within a budget, and measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias, Unpack

from torch import nn

from ..checks import is_number, is_whole
from ..errors import ExportError, PlanError
from ..phase import Phase
from ..phases import LatencyOf, enter_, phases_of
from ..plan import Budget, Cost, Metric, PlanChoices, PlannedSite, PlanOptions, RankPolicy, Ratio, chosen
from ..rewrite import a_twin, holds_captured, inline_, plan_of, transform
from ..tracing import Capture, ExampleInputs, Form, own_, shell, unwrap
from .batches import checked_batches
from .calibration import calibrate
from .candidates import Candidate, Candidates
from .model_times import ModelTimes
from .recover import Loss, recover_
from .result import NOISE, Compressed, compressed
from .site_times import SiteTimes

_MARGINS = (0.0, 0.15, 0.35, 1.0)
"""How much faster than dense a site has to be, tried in turn until the whole model is no slower; at 1 all are dense."""
_TIGHTENINGS = 3
_BISECTIONS = 8

Score: TypeAlias = Callable[[nn.Module], float]
"""The score of a module; larger is better."""


@dataclass(frozen=True)
class MaxDrop:
    """A budget of ``compress``: the fewest parameters with which the metric falls by at most so much.

    Attributes:
        drop: By how much the metric may fall, 0 or more, in the metric's own unit.

    Raises:
        PlanError: For a number that is negative or not finite.
    """

    drop: float

    def __post_init__(self) -> None:
        if not is_number(self.drop, 0):
            raise PlanError(f"a metric cannot fall by at most {self.drop!r}; give a number of 0 or more")


def compress(
    model: nn.Module,
    example_inputs: ExampleInputs,
    budget: RankPolicy | MaxDrop | Sequence[RankPolicy | MaxDrop],
    calibration: Iterable[ExampleInputs] | None = None,
    options: PlanOptions | None = None,
    *,
    metric: Score | None = None,
    recover_steps: int = 0,
    loss: Loss | None = None,
    times: SiteTimes | None = None,
    sequential: bool = False,
    form: Form = Form.GRAPH,
    how: Capture | None = None,
    progress: Callable[[str], None] | None = None,
    **choices: Unpack[PlanChoices],
) -> Compressed:
    """Cut a trained model to a budget so that its outputs change least, and measure what became of it.

    Args:
        model: An ``nn.Module``, or a net of ``transform`` in any phase; it stays as it is.
        example_inputs: As in ``transform``; FLOPs are counted, and times measured, at their shapes.
        budget: ``Budget(flops=0.5)`` and the like, ``MaxDrop(0.01)`` of the metric, or any rank policy. Several in a
            list have all to be met: then the metric's fall is no goal but a limit, and the result says what binds.
        calibration: Batches of inputs, each as ``example_inputs``; without them the cut is a plain SVD.
        options: What may be factored, and how. The budget decides the ranks, so that ``rank`` and
            ``allow_unprofitable`` say nothing here; of a net of ``transform`` only ``multiple_of`` is read, since it
            has a plan already.
        metric: Scores a module; larger is better.
        recover_steps: How many steps the cut model is fine-tuned for, as ``recover_`` does.
        loss: What the fine-tuning lowers, in place of the distance to the dense model's outputs; see ``recover_``.
        times: Measures sites where the model is to run. A site that is not faster factored then stays dense, and the
            whole is never slower than the dense model, unless the budget is one of parameters. None to measure nothing.
        sequential: As in ``truncate``.
        form: What the result is, as in ``transform``: a graph module, or a model of its own class.
        how: The kind of capture, as in ``transform``; for a model that is no net yet.
        progress: Is called with a sentence whenever something begins or has been tried.
        **choices: Fields of ``PlanOptions``, a shorthand for options.

    Returns:
        The compressed model, with what it costs and what it lost.

    Raises:
        PlanError: For a budget that cannot be met (the least one that can is said), and for options that do not go
            together.
        CalibrationError: For calibration data that do not serve.
        CaptureError: Where the model cannot be captured.
    """
    policy, drop = _parts(budget)
    if times is not None and not isinstance(times, SiteTimes):
        raise PlanError(f"times is {times!r}: give SiteTimes(), or None to measure nothing")
    for name, given in (("metric", metric), ("loss", loss), ("progress", progress)):
        if given is not None and not callable(given):
            raise PlanError(f"{name} is {given!r}: give a function, or leave it out")
    data = None if calibration is None else checked_batches(calibration, like=example_inputs)
    if sequential and data is None:
        raise PlanError("to calibrate one layer after the other takes calibration data, and there are none: give some")
    if not is_whole(recover_steps):
        raise PlanError(f"a recovery of {recover_steps!r} steps is none: give 0 or more")
    if recover_steps and data is None:
        raise PlanError("to recover takes calibration data, and there are none: give some, or leave the recovery out")
    if drop is not None and metric is None:
        raise PlanError("a budget of the metric's fall takes a metric, and data to score on: give both")
    if "rank" in choices:
        raise PlanError("the budget decides the ranks: leave out rank, or give the policy as the budget")
    settled = chosen(options, choices)
    if holds_captured(unwrap(model)) and settled != PlanOptions(multiple_of=settled.multiple_of):
        raise PlanError(
            f"{type(model).__name__} has its plan, which says what is factored: leave out the options of planning but "
            "multiple_of, or compress the original model"
        )
    tell = progress or (lambda said: None)
    tell("capturing the model")
    net, low = _in_full(model, example_inputs, settled, form, how)
    dense = inline_(shell(net))
    score = None
    if metric is not None:
        tell("scoring the dense model")
        score = _scored(metric, dense)
        tell(f"the dense model's metric is {score:.4f}")
    if data is not None:
        tell(f"calibrating on {len(data)} batches")
    known = None if data is None else calibrate(net, data)
    if times is not None:
        tell(f"timing the dense model by {times.provider}")
    whole = None if times is None else _timed(dense, example_inputs, times)
    latency = _latency(whole, tell)
    candidates = Candidates(net, dense, data, known, latency, settled.multiple_of, sequential, low, tell)
    search = _Search(candidates, policy, drop, metric, score, recover_steps, loss, whole)
    best = search.result()
    if times is not None:
        times.save()
    if metric is None or score is None:
        return best
    best = replace(best, metrics=(score, _scored(metric, best.module)))
    return best if drop is None or policy is None else search.within_both(best, drop)


def _parts(
    budget: RankPolicy | MaxDrop | Sequence[RankPolicy | MaxDrop],
) -> tuple[RankPolicy | None, float | None]:
    """The policy of the ranks, all budgets in one, and by how much the metric may fall. Raises PlanError."""
    parts = list(budget) if isinstance(budget, Sequence) and not isinstance(budget, str) else [budget]
    for each in parts:
        if not isinstance(each, MaxDrop) and (isinstance(each, type) or not hasattr(each, "ranks")):
            raise PlanError(
                f"{each!r} is no budget: give Budget(params=0.5), Budget(flops=0.5), Budget(latency=0.8), "
                "MaxDrop(0.01) or a rank policy"
            )
    drops = [each.drop for each in parts if isinstance(each, MaxDrop)]
    policies = [each for each in parts if not isinstance(each, MaxDrop)]
    shares = [share for each in policies if isinstance(each, Budget) for share in each.shares.items()]
    of = [metric for metric, _ in shares]
    if not parts or len(drops) > 1 or len(set(of)) < len(of):
        raise PlanError("several budgets are each of another thing: give one of parameters, FLOPs, time and fall each")
    if len(policies) > 1 and not all(isinstance(each, Budget) for each in policies):
        raise PlanError(f"{policies[0]!r} beside {policies[1]!r} says two things of the ranks: give one rank policy")
    drop = drops[0] if drops else None
    if len(policies) < 2:
        return (policies[0] if policies else None), drop
    even = any(each.even for each in policies if isinstance(each, Budget))
    return _budget(dict(shares), even), drop


def _budget(shares: Mapping[Metric, float], even: bool = False) -> Budget:
    """One budget of several shares."""
    return Budget(shares.get(Metric.PARAMS), shares.get(Metric.FLOPS), shares.get(Metric.LATENCY), even)


def _in_full(
    model: nn.Module, example_inputs: ExampleInputs, options: PlanOptions, form: Form, how: Capture | None
) -> tuple[nn.Module, dict[str, int]]:
    """The model as a net in evaluation mode, every site dense, and the ranks of those that were factored before."""
    if holds_captured(unwrap(model)):
        net = a_twin(model)
    else:
        # Of any rank, and whether it pays or not: that is decided by the budget.
        everything = replace(options, rank=Ratio(0.25), multiple_of=1, allow_unprofitable=True)
        net = a_twin(transform(model, example_inputs, everything, form=form, how=how, copy=False))
    phases = phases_of(net)
    low = {row.site.name: row.rank for row in plan_of(net).sites if phases[row.site.name] is Phase.LOW}
    enter_(net, Phase.FULL)
    return net, low


def _timed(dense: nn.Module, example_inputs: ExampleInputs, times: SiteTimes) -> ModelTimes:
    try:
        return ModelTimes(dense, example_inputs, times)
    except ExportError as error:
        raise ExportError(f"{error}, or measure no times (`--no-timing`, in Python times=None)") from error


def _latency(whole: ModelTimes | None, tell: Callable[[str], None]) -> LatencyOf | None:
    """Times of sites in shares of the dense model's."""
    if whole is None or whole.dense is None:
        return None
    sites, total = whole.sites, whole.dense
    told: set[str] = set()

    def cost(rows: Sequence[PlannedSite]) -> Cost | None:
        name = rows[0].site.name
        if name not in told:
            told.add(name)
            tell(f"timing {name}, dense and factored")
        return sites.cost(rows, total)

    return cost


@dataclass(frozen=True)
class _Search:
    """The search for a cut that meets the budget and is not slower than the dense model.

    ``result`` tries ``within_budget`` at rising margins: so much faster than dense has a site to be, to be factored at
    all; None where that does not matter. budget: of the ranks; None for as few parameters as drop allows. drop: by how
    much the metric may fall. score: the dense model's. ``within_budget`` tries ``cut`` until the whole model meets the
    budget.
    """

    candidates: Candidates
    budget: RankPolicy | None
    drop: float | None
    metric: Score | None
    score: float | None
    recover_steps: int
    loss: Loss | None
    whole: ModelTimes | None

    def result(self) -> Compressed:
        """The first result that is not slower than the dense model; by the budget alone where that does not count."""
        size_asked = isinstance(self.budget, Budget) and set(self.budget.shares) == {Metric.PARAMS}
        if size_asked or self.whole is None or self.whole.dense is None:
            return self.within_budget(None)
        notes: tuple[str, ...] = ()
        for margin in _MARGINS:
            try:
                result = self.within_budget(margin)
            except PlanError as error:
                raise PlanError(
                    f"{error}. Only layers that are faster than dense count here: give a budget of parameters, which "
                    "asks for size alone, or measure no times (`--no-timing`, in Python times=None)"
                ) from error
            assert result.times is not None
            if margin == _MARGINS[-1] or result.times.ratio <= 1 + NOISE:
                break
            self.candidates.tell(f"the whole takes {result.times.ratio:.2f} of the dense time: more layers stay dense")
            notes = (
                f"The whole model took {result.times.ratio:.2f} of the dense one's time with every layer that is "
                "faster by itself, so that those least faster stayed dense.",
            )
        return replace(result, notes=(*result.notes, *notes))

    def within_budget(self, margin: float | None) -> Compressed:
        """The result that meets the budget as a whole."""
        if self.budget is None:
            assert self.drop is not None
            return self.told(self._least_within(self.drop, margin))
        if isinstance(self.budget, Budget) and self.budget.latency is not None:
            return self._in_time(self.budget, self.budget.latency, margin)
        return self.told(self.cut(self.budget, margin))

    def cut(self, policy: RankPolicy, margin: float | None) -> Candidate:
        """The best cut by a policy, recovered if that is asked for and anything was lost."""
        cut, data = self.candidates.best(policy, margin), self.candidates.data
        own_(cut.module, self.candidates.net)
        if data is not None and self.recover_steps and any(site.loses for site in cut.cuts):
            self.candidates.tell(f"fine-tuning the result for {self.recover_steps} steps")
            recover_(cut.module, self.candidates.dense, data, self.recover_steps, loss=self.loss)
        return cut

    def told(self, candidate: Candidate) -> Compressed:
        """What is told of a cut: the whole model's time is measured here."""
        if self.whole is not None and self.whole.dense is not None:
            self.candidates.tell("timing the whole model beside the dense one")
        pair, untimed = (None, "") if self.whole is None else (self.whole.pair(candidate.module), self.whole.why)
        plan, known = plan_of(self.candidates.net), self.candidates.known
        return compressed(plan, candidate.module, candidate.cuts, known, pair, untimed)

    def _in_time(self, budget: Budget, asked: float, margin: float | None) -> Compressed:
        """The result that is measured to take the share of time that was asked for: the times of single sites may add
        up to less than the whole takes, and the budget is tightened by what is missing.
        """
        best, share = self.told(self.cut(budget, margin)), asked
        for _ in range(_TIGHTENINGS):
            if best.times is None or best.times.ratio <= asked + NOISE:
                return best
            share *= asked / best.times.ratio
            try:
                tried = self.told(self.cut(replace(budget, latency=share), margin))
            except PlanError:  # there is no less
                break
            if tried.times is not None and tried.times.ratio < best.times.ratio:
                best = tried
        if best.times is None or best.times.ratio <= asked + NOISE:
            return best
        reached = f"{best.times.ratio:.2f}"
        missed = f"Asked for {asked:g} of the dense model's time; the least that was reached is {reached}."
        return replace(best, notes=(*best.notes, missed))

    def _least_within(self, drop: float, margin: float | None) -> Candidate:
        """The cut of fewest parameters whose metric has fallen by at most so much, by bisection of the budget."""
        low, high, best = 0.0, 1.0, self.cut(Budget(params=1.0), margin)
        for _ in range(_BISECTIONS):
            share = (low + high) / 2
            try:
                tried = self.cut(Budget(params=share), margin)
            except PlanError:  # rank 1 everywhere is still larger
                low = share
                continue
            if self._falls_within(tried, drop, f"{share:.1%} of the parameters"):
                high, best = share, tried
            else:
                low = share
        return best

    def _falls_within(self, tried: Candidate, drop: float, what: str) -> bool:
        """Whether the metric has fallen by at most so much; not where it is no number."""
        assert self.metric is not None
        assert self.score is not None
        value = self.metric(tried.module)
        within = bool(value >= self.score - drop)
        self.candidates.tell(f"{what}: metric {float(value):.4f}, {'within' if within else 'below'} what is allowed")
        return within

    def within_both(self, result: Compressed, drop: float) -> Compressed:
        """A result of the budget whose metric has fallen by no more than allowed, with what binds as a note.

        Raises PlanError where it has fallen by more, and says how much of the model that fall would take.
        """
        assert result.metrics is not None
        fall = result.metrics[0] - result.metrics[1]
        said = f"the metric falls by {fall:.4g}" if fall > 0 else "the metric does not fall"
        reached = {Metric.PARAMS: result.params[1] / max(result.params[0], 1)}
        if result.flops is not None:
            reached[Metric.FLOPS] = result.flops[1] / max(result.flops[0], 1)
        if result.times is not None:
            reached[Metric.LATENCY] = result.times.ratio
        shares = self.budget.shares if isinstance(self.budget, Budget) else {}
        asked = " and ".join(f"{share:g} of the {what.value}" for what, share in shares.items()) or repr(self.budget)
        if fall > drop:
            raise PlanError(
                f"both budgets cannot be met: at {asked} {said}, and {drop:g} is allowed; {self._enough(shares, drop)}"
            )
        near = [f"{reached[what]:.3g} of the {what.value}" for what, share in shares.items() if what in reached]
        binding = max(shares, key=lambda what: reached.get(what, 0) / shares[what], default=None)
        binds = f", and what binds is the budget of {binding.value}" if binding is not None else ""
        note = f"All budgets are met: {', '.join([*near, said])} of the {drop:g} allowed{binds}."
        return replace(result, notes=(*result.notes, note))

    def _enough(self, shares: Mapping[Metric, float], drop: float) -> str:
        """In words, the least shares that keep the metric's fall within the limit."""
        if not shares:
            return "give a larger rank or a larger fall"
        low, high, enough = 0.0, 1.0, dict.fromkeys(shares, 1.0)
        for _ in range(_BISECTIONS // 2):
            middle = (low + high) / 2
            tried = {what: share + middle * (1 - share) for what, share in shares.items()}
            said = " and ".join(f"{share:.1%} of the {what.value}" for what, share in tried.items())
            cut = self.cut(_budget(tried), None)
            if self._falls_within(cut, drop, said):
                high, enough = middle, tried
            else:
                low = middle
        least = " and ".join(f"{share:.2g} of the {what.value}" for what, share in enough.items())
        return f"it takes {least}: give that, or allow a larger fall"


def _scored(metric: Score, module: nn.Module) -> float:
    said = metric(module)
    try:
        value = float(said)
    except (TypeError, ValueError) as error:
        raise PlanError(f"the metric is {said!r} and no number: return one") from error
    if not math.isfinite(value):
        raise PlanError(f"the metric is {value}, which nothing can be compared with: see that it is a finite number")
    return value
