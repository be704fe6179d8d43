"""The search for the cut that meets a budget, as it is measured on the whole model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import nn

from ..errors import PlanError, telling
from ..plan import Budget, Metric, RankPolicy
from ..processes import ALONE, Processes
from ..rewrite import plan_of
from ..text import counted
from ..tracing import own_, same_buffers
from .candidates import Candidate, Candidates
from .model_times import ModelTimes
from .recover import Loss, recovered_
from .result import NOISE, Compressed, compressed

_MARGINS = (0.0, 0.15, 0.35, 1.0)
"""How much faster than dense a site has to be, tried in turn until the whole model is no slower; at 1 all are dense."""
_TIGHTENINGS = 3
_BISECTIONS = 6

Score: TypeAlias = Callable[[nn.Module], float | tuple[float, float]]
"""The score of a module, larger is better; or (score, how many examples it is of)."""


@dataclass(frozen=True)
class Search:
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
        return self._recovered(self.candidates.best(policy, margin))

    def _recovered(self, cut: Candidate) -> Candidate:
        """The cut itself, fine-tuned."""
        data = self.candidates.data
        own_(cut.module, self.candidates.net)
        if data is not None and self.recover_steps and any(site.loses for site in cut.cuts):
            self.candidates.tell(f"fine-tuning the result for {counted(self.recover_steps, 'step')}")
            trained = [p for p in cut.module.parameters() if p.is_floating_point()]
            dense, processes = self.candidates.dense, self.candidates.processes
            recovered_(cut.module, dense, data, self.recover_steps, self.loss, trained, processes)
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
        low, high = 0.0, 1.0
        best = self._recovered(self.candidates.cut(self.candidates.ranks(Budget(params=1.0), margin, {})))
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
        value = _mean_score(self.metric, tried.module, self.candidates.processes)
        within = value >= self.score - drop
        self.candidates.tell(f"{what}: metric {value:.4f}, {'within' if within else 'below'} what is allowed")
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
                f"the budgets cannot be met together: at {asked} {said}, which is more than max_drop={drop:g}; "
                f"{self._enough(shares, drop)}"
            )
        near = [f"{reached[what]:.3g} of the {what.value}" for what, share in shares.items() if what in reached]
        binding = max(shares, key=lambda what: reached.get(what, 0) / shares[what], default=None)
        binds = f", and what binds is the budget of {binding.value}" if binding is not None else ""
        note = f"All budgets are met: {', '.join([*near, said])} of the {drop:g} allowed{binds}."
        return replace(result, notes=(*result.notes, note))

    def _enough(self, shares: Mapping[Metric, float], drop: float) -> str:
        """In words, the least shares that keep the metric's fall within the limit."""
        if not shares:
            return "give a larger rank, or a larger max_drop"
        low, high, enough = 0.0, 1.0, dict.fromkeys(shares, 1.0)
        for _ in range(_BISECTIONS // 2):
            middle = (low + high) / 2
            tried = {what: share + middle * (1 - share) for what, share in shares.items()}
            said = " and ".join(f"{share:.1%} of the {what.value}" for what, share in tried.items())
            cut = self.cut(budget_of(tried), None)
            if self._falls_within(cut, drop, said):
                high, enough = middle, tried
            else:
                low = middle
        least = " and ".join(f"{what.name.lower()}={math.ceil(100 * share) / 100:g}" for what, share in enough.items())
        return f"give {least}, or a larger max_drop"


def budget_of(shares: Mapping[Metric, float], even: bool = False) -> Budget:
    """One budget of several shares."""
    return Budget(shares.get(Metric.PARAMS), shares.get(Metric.FLOPS), shares.get(Metric.LATENCY), even)


def scored(metric: Score, module: nn.Module, processes: Processes = ALONE) -> float:
    """The score of a module, the mean over the processes. Raises PlanError for what is no finite number."""
    value = _mean_score(metric, module, processes)
    if not math.isfinite(value):
        raise PlanError(f"the metric is {value}, which nothing can be compared with: see that it is a finite number")
    return value


def _mean_score(metric: Score, module: nn.Module, processes: Processes) -> float:
    """The mean over the processes, each counted by the examples that its score is of, or once."""
    with processes.all_or_none(PlanError, "scoring"):
        with same_buffers(module), telling("the metric", PlanError):
            said = metric(module)
        value, count = _numbers(said)
    if processes.count == 1:
        return value
    sums = torch.tensor([value * count if count else 0.0, count], dtype=torch.float64)
    processes.sum_([sums])
    return float(sums[0] / sums[1])


def _numbers(said: float | tuple[float, float]) -> tuple[float, float]:
    """(score, how many examples it is of). Raises PlanError for what is none."""
    value, count = said if isinstance(said, tuple) and len(said) == 2 else (said, 1)
    try:
        score, weight = float(value), float(count)
    except (TypeError, ValueError) as error:
        raise PlanError(f"the metric is {said!r} and no number: return one") from error
    if not (math.isfinite(weight) and weight >= 0):
        raise PlanError(f"the metric is of {weight} examples: return (score, count) with a count of 0 or more")
    return score, weight
