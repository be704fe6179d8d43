"""What is deployed of a trained net: the one module that ``export`` writes, and what its file tells of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import nn
from torch.distributed import ProcessGroup

from ..errors import CalibrationError
from ..phase import Phase
from ..phases import enter_, phases_of
from ..processes import in_group
from ..rewrite import a_twin, inline_, plan_of, site_groups
from ..tracing import ExampleInputs, own_, same_buffers, same_values, shell, unwrap
from .batchnorms import recalibrate_
from .site_times import SiteTimes
from .truncation import truncated


def dense_form(net: nn.Module) -> nn.Module:
    """The net with all of its sites dense: what factors compute, by their products, to compare times with.

    Args:
        net: A net of ``transform``, in any phases; it stays as it is.

    Returns:
        Plain torch, in evaluation mode.

    Raises:
        PlanError: For a module that ``transform`` did not make.
    """
    with same_values(unwrap(net)):
        twin = a_twin(net)
        enter_(twin, Phase.FULL)
    return own_(inline_(twin, layers=True), net)


@dataclass(frozen=True)
class Deployed:
    """module: plain torch, in evaluation mode. metadata: the plan, and the metric where it is known. left_dense: the
    sites that are slower in factors, and so stayed dense.
    """

    module: nn.Module
    metadata: dict[str, str]
    left_dense: tuple[str, ...] = ()


def deployed(
    net: nn.Module,
    batches: Sequence[ExampleInputs] = (),
    *,
    metric: Callable[[nn.Module], float | None] | None = None,
    measured: float | None = None,
    times: SiteTimes | None = None,
    group: ProcessGroup | None = None,
) -> Deployed:
    """The net with all of its sites in factors.

    Where all are in LOW, these are its own, and it is the module that training measured last. Sites that are dense at
    the end are cut so that their outputs on the calibration batches change least; batch norms are then given new
    statistics, and the module is scored anew.

    Args:
        net: A net of ``transform``, in any phases; it is put into evaluation mode where it has two.
        batches: Calibration batches, each as the example inputs; without any the cut is a plain SVD.
        metric: Of a module; it may say None where there is nothing to score on.
        measured: The metric at the end of training of the net with its sites in LOW.
        times: Measures each site; those that take longer in factors are dense, where they trained in LOW by the
            products of their factors.
        group: The processes that do so together, as of ``truncate``, each with its own batches; ``metric`` says the
            same in all.

    Raises:
        PlanError: For a module that ``transform`` did not make.
        CalibrationError: For batches that do not fit the model.
    """
    processes = in_group(group, CalibrationError)
    slower: list[str] = []
    if times is not None:
        slower = processes.from_one(0, partial(_slower, net, times), CalibrationError, "timing the sites")
    if set(phases_of(net).values()) <= {Phase.LOW}:
        module, score = truncated(net, None, group=group, dense=slower), measured
    else:
        calibrating = any(processes.gathered(bool(batches)))
        module = truncated(net, batches if calibrating else None, group=group, dense=slower)
        if calibrating:
            recalibrate_(module, batches, like=inline_(shell(net.eval())), group=group)
        with same_buffers(module):
            score = None if metric is None else metric(module)
    metadata = {"dynrank_plan": plan_of(net).to_json()}
    if score is not None:
        metadata["dynrank_metric"] = f"{score:.6g}"
    return Deployed(module, metadata, tuple(slower))


def _slower(net: nn.Module, times: SiteTimes) -> list[str]:
    """The sites that take longer in factors than dense, each by itself; those that cannot be run so are left out."""
    rows = {row.site.name: row for row in plan_of(net).sites}
    pairs = [
        (group.names, times.pair([rows[name] for name in group.names], group.owner.rank)) for group in site_groups(net)
    ]
    return [name for names, pair in pairs if pair is not None and pair.ratio > 1 for name in names]
