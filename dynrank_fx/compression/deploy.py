"""What is deployed of a trained net: the one module that ``export`` writes, and what its file tells of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn
from torch.distributed import ProcessGroup

from ..errors import CalibrationError
from ..phase import Phase
from ..phases import phases_of
from ..processes import in_group
from ..rewrite import inline_, plan_of
from ..tracing import ExampleInputs, same_buffers, shell
from .batchnorms import recalibrate_
from .truncation import truncate


@dataclass(frozen=True)
class Deployed:
    """module: plain torch, in evaluation mode. metadata: the plan, and the metric where it is known."""

    module: nn.Module
    metadata: dict[str, str]


def deployed(
    net: nn.Module,
    batches: Sequence[ExampleInputs] = (),
    *,
    metric: Callable[[nn.Module], float | None] | None = None,
    measured: float | None = None,
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
        group: The processes that do so together, as of ``truncate``, each with its own batches; ``metric`` says the
            same in all.

    Raises:
        PlanError: For a module that ``transform`` did not make.
        CalibrationError: For batches that do not fit the model.
    """
    if set(phases_of(net).values()) <= {Phase.LOW}:
        module, score = truncate(net, group=group), measured
    else:
        calibrating = any(in_group(group, CalibrationError).gathered(bool(batches)))
        module = truncate(net, batches if calibrating else None, group=group)
        if calibrating:
            recalibrate_(module, batches, like=inline_(shell(net.eval())), group=group)
        with same_buffers(module):
            score = None if metric is None else metric(module)
    metadata = {"dynrank_plan": plan_of(net).to_json()}
    if score is not None:
        metadata["dynrank_metric"] = f"{score:.6g}"
    return Deployed(module, metadata)
