"""``compress``: a trained model, dense or of phase training, made smaller or faster within a budget, and measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Unpack

from torch import nn
from torch.distributed import ProcessGroup

from ..checks import check_flags, is_number, is_whole
from ..errors import CalibrationError, ExportError, PlanError
from ..phase import Phase
from ..phases import LatencyOf, enter_, phases_of
from ..plan import Budget, Cost, PlanChoices, PlannedSite, PlanOptions, RankPolicy, Ratio, chosen
from ..processes import Processes, as_first_, check_same, in_group, whole_weights
from ..rewrite import a_twin, holds_captured, inline_, plan_of, transform
from ..text import counted
from ..tracing import Capture, ExampleInputs, Form, infinite_statistic, shell, unwrap
from .batches import checked_batches
from .calibration import calibrated, room_beside
from .candidates import Candidates
from .conv_layouts import choose_conv_layouts_
from .covariance import Bases
from .model_times import ModelTimes
from .recover import Loss
from .result import Compressed
from .search import Score, Search, budget_of, scored
from .site_times import SiteTimes


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
    group: ProcessGroup | None = None,
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
        metric: Scores a module; larger is better. It gives a number, or (number, how many examples it is of).
        recover_steps: How many steps the cut model is fine-tuned for, as ``recover_`` does.
        loss: What the fine-tuning lowers, in place of the distance to the dense model's outputs; see ``recover_``.
        times: Measures sites where the model is to run. A site that is not faster factored then stays dense, and the
            whole is never slower than the dense model, unless the budget is one of parameters. None to measure nothing.
        sequential: As in ``truncate``.
        form: What the result is, as in ``transform``: a graph module, or a model of its own class.
        how: The kind of capture, as in ``transform``; for a model that is no net yet.
        progress: Is called with a sentence whenever something begins or has been tried.
        group: The processes that compress together, such as ``torch.distributed.group.WORLD``: each has the same model
            and gives its own batches, of which some may have none (an empty list). ``metric`` scores each process's own
            data, and the mean over the processes counts, each by its examples. The first decides, measures times, keeps
            their file and calls ``progress``. By default this process alone.
        **choices: Fields of ``PlanOptions``, a shorthand for options.

    Returns:
        The compressed model, with what it costs and what it lost; the same in all processes.

    Raises:
        PlanError: For a budget that cannot be met (the least one that can is said), and for options that do not go
            together.
        CalibrationError: For calibration data that do not serve, and statistics of batch norms that are not finite.
        CaptureError: Where the model cannot be captured.
    """
    processes = in_group(group, PlanError)
    with processes.all_or_none(PlanError, "compress"):
        policy, drop = _parts(budget)
        settled = chosen(options, choices)
        _check_options(calibration is None, metric, recover_steps, loss, times, sequential, progress)
        if drop is not None and metric is None:
            raise PlanError("a budget of the metric's fall takes a metric, and data to score on: give both")
        _check_planning(model, settled, "rank" in choices)
        given: dict[str, object] = {
            "the budget": policy if policy is None or isinstance(policy, Budget) else type(policy).__qualname__,
            "the fall of the metric": drop,
            "the argument recover_steps": recover_steps,
            "the argument sequential": sequential,
        }
        more = {"calibration": calibration, "metric": metric, "loss": loss, "times": times}
        given |= {f"whether there is the argument {name}": value is not None for name, value in more.items()}
    check_same(processes, given, PlanError)
    data = None if calibration is None else checked_batches(calibration, example_inputs, processes)
    tell = progress if progress is not None and processes.first else _silent
    tell("capturing the model")
    with processes.all_or_none(PlanError, "capturing the model"):
        net, low = _in_full(model, example_inputs, settled, form, how)
        weights = whole_weights(processes, net, PlanError)
    check_same(processes, {"the plan": plan_of(net).to_json()} | weights, PlanError)
    as_first_(processes, net.buffers())  # after training each process has statistics of its own
    dense = inline_(shell(net))
    score = None
    if metric is not None:
        whose = "the model, part of which is of low rank already" if low else "the dense model"
        tell(f"scoring {whose}")
        score = scored(metric, dense, processes)
        tell(f"its metric is {score:.4f}")
    if data is not None:
        tell(f"calibrating on {counted(sum(processes.gathered(len(data))), 'batch', 'batches')}")
    known = None if data is None else calibrated(net, data, processes=processes)
    known = known if known is None else replace(known, bases=Bases(room_beside(net)))
    if not holds_captured(unwrap(model)):
        known = choose_conv_layouts_(net, settled, data, known, processes)
    if times is not None:
        tell(f"timing the dense model by {times.provider}")
    whole = None if times is None else _timed(dense, example_inputs, times, processes)
    latency = _latency(whole, tell)
    candidates = Candidates(net, dense, data, known, latency, settled.multiple_of, sequential, low, tell, processes)
    search = Search(candidates, policy, drop, metric, score, recover_steps, loss, whole)
    best = search.result()
    if times is not None and processes.first:
        times.save()
    if metric is None or score is None:
        return best
    best = replace(best, metrics=(score, scored(metric, best.module, processes)))
    return best if drop is None or policy is None else search.within_both(best, drop)


def _silent(said: str) -> None:
    """For a caller who is told nothing."""


def _check_options(
    without_data: bool,
    metric: Score | None,
    recover_steps: int,
    loss: Loss | None,
    times: SiteTimes | None,
    sequential: bool,
    progress: Callable[[str], None] | None,
) -> None:
    """Raises PlanError for arguments that cannot be, or not without data."""
    check_flags(PlanError, sequential=sequential)
    if times is not None and not isinstance(times, SiteTimes):
        raise PlanError(f"times is {times!r}: give SiteTimes(), or None to measure nothing")
    for name, given in (("metric", metric), ("loss", loss), ("progress", progress)):
        if given is not None and not callable(given):
            raise PlanError(f"{name} is {given!r}: give a function, or leave it out")
    if sequential and without_data:
        raise PlanError("to calibrate one layer after the other takes calibration data, and there are none: give some")
    if not is_whole(recover_steps):
        raise PlanError(f"a recovery of {recover_steps!r} steps is none: give 0 or more")
    if recover_steps and without_data:
        raise PlanError("to recover takes calibration data, and there are none: give some, or leave the recovery out")


def _check_planning(model: nn.Module, settled: PlanOptions, ranks: bool) -> None:
    """Raises for a model that no plan can serve, and for options that its plan leaves no room for. ranks: whether a
    rank policy is given beside the budget.
    """
    if (what := infinite_statistic(unwrap(model))) is not None:
        raise CalibrationError(
            f"{what} is not finite, as after a training that has diverged: load sound weights, or give the batch norms "
            "new statistics by recalibrate_"
        )
    if ranks:
        raise PlanError("the budget decides the ranks: leave out rank, or give the policy as the budget")
    if holds_captured(unwrap(model)) and settled != PlanOptions(multiple_of=settled.multiple_of):
        raise PlanError(
            f"{type(model).__name__} has its plan, which says what is factored: leave out the options of planning but "
            "multiple_of, or compress the original model"
        )


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
    return budget_of(dict(shares), even), drop


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


def _timed(dense: nn.Module, example_inputs: ExampleInputs, times: SiteTimes, processes: Processes) -> ModelTimes:
    try:
        return ModelTimes(dense, example_inputs, times, processes)
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
