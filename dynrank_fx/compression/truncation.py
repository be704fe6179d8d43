"""The end of training: a factored net cut for good into an ordinary torch module."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ..checks import check_flags
from ..errors import CalibrationError, DynrankWarning
from ..layouts import Factors, Layout
from ..phase import Phase
from ..phases import RankUnit, enter_, rank_units, replan_
from ..plan import Budget, RankPolicy, checked_policy, ranks_by_policy
from ..processes import ALONE, Processes, as_first_, check_same, in_group, whole_weights
from ..rewrite import Switched, a_twin, inline_, plan_of, stack_firsts_, switched_modules
from ..tracing import ExampleInputs, own_, same_values, unwrap
from .batches import checked_batches
from .calibration import calibrated
from .covariance import Calibration

_NOTHING = 1e-4  # the change of a weight that is rounding
_ROUNDING = 1e-5  # of a mean output: what a cut that loses nothing seems to take of it


@dataclass(frozen=True)
class Cut:
    """What became of one site.

    Attributes:
        site: The site's name.
        rank: The rank of its factors; None where it is dense.
        error: ‖W − W'‖_F / ‖W‖_F.
        why: Why the cut was not calibrated, or empty.
    """

    site: str
    rank: int | None
    error: float = 0.0
    why: str = ""

    @property
    def loses(self) -> bool:
        """Whether the weight is another by more than rounding."""
        return self.error > _NOTHING


def truncate(
    net: nn.Module,
    calibration: Calibration | Iterable[ExampleInputs] | None = None,
    *,
    rank: RankPolicy | None = None,
    sequential: bool = False,
    stacked: bool = False,
    group: ProcessGroup | None = None,
) -> nn.Module:
    """The evaluation graph of the net with every site factored for good, as an ordinary torch module.

    Nothing of this package is left in it. Sites in LOW keep their factors; sites in FULL are cut to the ranks of the
    plan.

    Args:
        net: What ``transform`` made, in any phase; it stays as it is.
        calibration: Batches of inputs, each as ``example_inputs``, or what ``calibrate`` made of them, to keep the
            *outputs* of each site best. Without it, and where a site's outputs do not decide, the cut is a plain SVD of
            the weight, which a dense-trained model rarely survives.
        rank: Decides the ranks anew, on what the outputs hold where there is calibration; a site whose factors would
            then cost no less than its dense weight becomes dense.
        sequential: Whether sites are calibrated one after the other, each on what the sites before it give after their
            cut; it takes as many passes over the batches as there are sites.
        stacked: Whether the first factors of linear layers that read one value become one layer and one product:
            ``query.right``, ``key.right`` and ``value.right`` become ``query_key_value.right``. Outputs stay up to
            rounding. An ONNX file is stacked in any case.
        group: The processes that cut together, such as ``torch.distributed.group.WORLD``: each has the same net and
            gives its own batches, of which some may have none (an empty list). The cut is as of one process with all
            batches; ranks and factors are the first one's, bit by bit. By default this process alone.

    Returns:
        The truncated module, in evaluation mode; the same in all processes.

    Raises:
        PlanError: For a module that ``transform`` did not make, and for ``stacked`` where there is no graph.
        TransitionError: For non-finite weights.
        CalibrationError: For data that are empty, not finite or do not fit the model, and for nets or arguments that
            are not the same in all processes. What fails in one process fails in all.

    Warns:
        DynrankWarning: Where a site lost something to a cut by plain SVD; it says which and why.
    """
    return truncated(net, calibration, rank=rank, sequential=sequential, stacked=stacked, group=group, stacklevel=3)


def truncated(
    net: nn.Module,
    calibration: Calibration | Iterable[ExampleInputs] | None,
    *,
    rank: RankPolicy | None = None,
    sequential: bool = False,
    stacked: bool = False,
    group: ProcessGroup | None = None,
    dense: Collection[str] = (),
    stacklevel: int = 2,
) -> nn.Module:
    """As ``truncate``. dense: the sites that are to be dense; those in LOW are then the products of their factors."""
    processes = in_group(group, CalibrationError)
    with processes.all_or_none(CalibrationError, "truncate"):
        check_flags(CalibrationError, sequential=sequential, stacked=stacked)
        with same_values(unwrap(net)):
            twin = a_twin(net)
        given: dict[str, object] = {
            "the kind of calibration": _kind(calibration),
            "the argument sequential": sequential,
            "the argument stacked": stacked,
        }
        given |= {"the argument rank": rank is not None} | whole_weights(processes, unwrap(net), CalibrationError)
    check_same(processes, given, CalibrationError)
    as_first_(processes, twin.buffers())  # after training each process has statistics of its own
    with same_values(unwrap(net)):
        cuts = cut_(twin, calibration, rank=rank, sequential=sequential, dense=dense, processes=processes)
    for sentence in cut_plainly(cuts) if processes.first else ():
        warnings.warn(sentence, DynrankWarning, stacklevel=stacklevel)
    module = inline_(twin, layers=True)
    if stacked:
        stack_firsts_(module)
    return own_(module, net)


def _kind(calibration: Calibration | Iterable[ExampleInputs] | None) -> str:
    if calibration is None:
        return "none"
    return "what calibrate made" if isinstance(calibration, Calibration) else "batches"


def cut_plainly(cuts: Sequence[Cut]) -> list[str]:
    """The sites that lost something to a cut by plain SVD, a sentence for each reason."""
    by_reason: dict[str, list[str]] = {}
    for cut in cuts:
        if cut.why and cut.error > 0:
            by_reason.setdefault(cut.why, []).append(cut.site)
    return [
        f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if names[3:] else ''}: cut by plain SVD, since {why}"
        for why, names in by_reason.items()
    ]


def cut_(
    net: nn.Module,
    calibration: Calibration | Iterable[ExampleInputs] | None,
    *,
    rank: RankPolicy | None = None,
    sequential: bool = False,
    dense: Collection[str] = (),
    processes: Processes = ALONE,
) -> list[Cut]:
    """Bring every site into its last form, in the net itself; the arguments are those of ``truncated``."""
    if not switched_modules(net):
        return []
    if sequential and (calibration is None or isinstance(calibration, Calibration)):
        raise CalibrationError("to calibrate the sites one after the other takes batches: give a list of inputs")
    known, data = calibration, None
    if not (calibration is None or isinstance(calibration, Calibration)):
        data = checked_batches(calibration, processes=processes)
        known = calibrated(net, data, processes=processes)
    assert known is None or isinstance(known, Calibration)
    ranks = processes.from_one(0, lambda: ranks_of(net, rank, known), CalibrationError, "choosing the ranks")
    return apply_ranks_(net, ranks | dict.fromkeys(dense), known, data if sequential else None, processes)


def apply_ranks_(
    net: nn.Module,
    ranks: Mapping[str, int | None],
    known: Calibration | None,
    in_turn: Sequence[ExampleInputs] | None = None,
    processes: Processes = ALONE,
) -> list[Cut]:
    """Cut every site to its rank; None makes it dense. in_turn: batches to calibrate one site after the other on.

    Every process cuts by itself, so that none waits in the midst of it for one that has failed. What comes of it would
    be the same on equal machines; to be so on all, the factors are then those of the first.
    """
    sites = {name: modules[0] for name, modules in switched_modules(net).items()}
    # In the order of the sites: that of a set is another in every process.
    changing = [name for name, site in sites.items() if site.phase != int(Phase.LOW) or site.rank != ranks[name]]
    with processes.all_or_none(CalibrationError, "a cut"):
        dense = enter_(net, dict.fromkeys(changing, Phase.FULL))
        replan_(net, plan_of(net).with_ranks({name: r for name, r in ranks.items() if r is not None}))
    as_first_(processes, _values(sites, [change.site for change in dense.changes]))
    low = {name: Phase.LOW for name in changing if ranks[name] is not None}
    errors: dict[str, float] = {}
    for some in _turns(low, known, in_turn is not None):
        seen = known if in_turn is None else calibrated(net, in_turn, list(some), processes=processes)
        with processes.all_or_none(CalibrationError, "a cut"):
            cutter = _Cutter(seen)
            errors |= {change.site: change.error for change in enter_(net, some, split=cutter).changes}
        as_first_(processes, _values(sites, some))
        cutter.fold_(net, processes)
    errors = processes.from_one(0, lambda: errors, CalibrationError, "a cut")
    why = {} if known is None else known.plain
    none = "there are no calibration data" if known is None else ""
    return [
        Cut(name, r, errors.get(name, 0.0), (none or why.get(name, "")) if name in low else "")
        for name, r in ranks.items()
    ]


def _values(sites: Mapping[str, Switched], names: Iterable[str]) -> list[Tensor]:
    """The weights or the factors of some sites."""
    held = [module._parameters[name] for module in map(sites.__getitem__, names) for name in module.parameter_names]
    return [parameter for parameter in held if parameter is not None]


def added_biases(net: nn.Module, known: Calibration) -> dict[str, int]:
    """How many bias values a cut adds to a site without a bias, or to the sites that share its factor, by the first
    name: for each module of it whose mean output a bias has to take up.
    """
    parameters = dict(net.named_parameters())
    added: dict[str, int] = {}
    for covariance in known.covariances.values():
        modules = [net.get_submodule(key) for key in covariance.sums if key not in parameters]
        weights = [module.weight for module in modules if module._parameters["bias"] is None]
        count = sum(covariance.oriented(weight).shape[:-1].numel() for weight in weights if isinstance(weight, Tensor))
        added[covariance.sites[0]] = count
    return added


def ranks_of(
    net: nn.Module, policy: RankPolicy | None, known: Calibration | None, units: Sequence[RankUnit] = ()
) -> dict[str, int | None]:
    """The ranks of the sites by the policy, or the plan's; None for those that are to be dense. units: as
    ``rank_units`` makes them; by default all ranks, and what the outputs hold where that is known.
    """
    if policy is None:
        return {row.site.name: row.rank for row in plan_of(net).sites}
    units = units or rank_units(net, spectrum=None if known is None else known.spectrum)
    chosen = ranks_by_policy([checked_policy(policy)] * len(units), [unit.curve for unit in units])
    counted = tuple(policy.shares) if isinstance(policy, Budget) else ()
    ranks: dict[str, int | None] = {}
    for unit, wanted in zip(units, chosen, strict=True):
        r = min((rank for rank in unit.curve.grid if rank >= wanted), default=wanted)
        ranks |= dict.fromkeys(unit.names, r if r < unit.curve.max_rank and unit.pays(r, *counted) else None)
    return ranks


def _turns(low: Mapping[str, Phase], known: Calibration | None, sequential: bool) -> list[dict[str, Phase]]:
    """The sites to cut together: all of them, or one after the other in the order of their calls."""
    if known is None or not sequential:
        return [dict(low)] if low else []
    turns = []
    for first in known.order:
        seen = known.covariances.get(first)
        names = [name for name in (seen.sites if seen else (first,)) if name in low]
        turns.append(dict.fromkeys(names, Phase.LOW))
    taken = set().union(*turns)
    rest = {name: phase for name, phase in low.items() if name not in taken}
    return [turn for turn in (*turns, rest) if turn]


@dataclass
class _Cutter:
    """Factors by calibration, remembering what they lose of the mean outputs, which a bias takes up."""

    known: Calibration | None
    shifts: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, sites: Sequence[str], layout: Layout, weight: Tensor, rank: int) -> Factors | None:
        seen = None if self.known is None else self.known.covariances.get(sites[0])
        factors = None if self.known is None else self.known.split(sites, layout, weight, rank)
        if seen is not None and factors is not None:
            left, right = seen.oriented_factors(factors)
            V = nn.functional.normalize(left, dim=-2)
            for key, (total, n) in seen.sums.items():
                mean = whole = (total / n)[..., None]
                if seen.of_inputs:
                    whole = seen.oriented(weight).double() @ mean
                    shift = whole - left @ (right @ mean)
                else:
                    shift = mean - V @ (V.mT @ mean)
                if float(shift.norm()) > _ROUNDING * float(whole.norm()):  # else a bias would be added for nothing
                    self.shifts[key] = shift.flatten()
        return factors

    @torch.no_grad()
    def fold_(self, net: nn.Module, processes: Processes) -> None:
        """Add to the biases what the cuts of the first process took from the mean outputs; a module without a bias
        gets one.
        """
        parameters = dict(net.named_parameters())
        shifts = processes.from_one(0, lambda: self.shifts, CalibrationError, "a cut")
        for name, shift in shifts.items():
            if name in parameters:
                bias = parameters[name]
                bias.data = bias.data + shift.to(bias.dtype)  # not in place: its values may be those of another net
            else:
                _add_to_bias(net.get_submodule(name), shift)


def _add_to_bias(module: nn.Module, shift: Tensor) -> None:
    assert isinstance(module, Switched)
    bias = module._parameters["bias"]
    like = module.outline if bias is None else bias
    value = shift.to(like.dtype) if bias is None else (bias.double() + shift).to(bias.dtype)
    # A bias of its own, should it be another module's too.
    module._parameters["bias"] = nn.Parameter(value.clone(), requires_grad=module.factors[0].requires_grad)
