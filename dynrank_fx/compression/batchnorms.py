"""The batch norms of a module, be they modules or calls in a graph of torch.export, and their statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from typing import TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.distributed import ProcessGroup
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import CalibrationError
from ..layouts import at_least_float32
from ..processes import Processes, as_first_, check_same, in_group, whole_weights
from ..tracing import ExampleInputs, batch_size, same_buffers, split_inputs, unwrap
from .batches import call, checked_batches

Statistics: TypeAlias = tuple[Tensor, Tensor]
"""Mean and variance of what reaches a batch norm, [channels] each."""

_SILENT, _LEAST = 1e-3, 1e-12
"""A variance below this share of the one from training, or below the second, is none to take a ratio of."""

_MEAN, _VARIANCE, _TRAINING, _MOMENTUM = 3, 4, 5, 6  # the places of these arguments in aten.batch_norm


@dataclass(frozen=True)
class ModuleNorm:
    """A batch norm that is a module."""

    module: _BatchNorm

    @property
    def statistics(self) -> Statistics:
        """Running mean and variance, [channels] each."""
        mean, variance = self.module.running_mean, self.module.running_var
        assert mean is not None
        assert variance is not None
        return mean, variance

    def observe(self, momentum: float) -> None:
        """Take in, from now on, this share of what the next batch has."""
        self.module.train()
        self.module.momentum = momentum


@dataclass(frozen=True)
class NodeNorm:
    """A batch norm that is a call of aten.batch_norm on its statistics."""

    owner: fx.GraphModule
    node: fx.Node

    @property
    def statistics(self) -> Statistics:
        """As of ``ModuleNorm``."""
        mean, variance = (attrgetter(str(self.node.args[i].target))(self.owner) for i in (_MEAN, _VARIANCE))  # type: ignore[union-attr]
        return mean, variance

    def observe(self, momentum: float) -> None:
        """As of ``ModuleNorm``, once the owner is compiled anew."""
        self.node.args = (*self.node.args[:_TRAINING], True, momentum, *self.node.args[_MOMENTUM + 1 :])


Norm: TypeAlias = ModuleNorm | NodeNorm


def norms_of(module: nn.Module) -> list[Norm]:
    """The batch norms that keep running statistics."""
    parts = list(module.modules())
    modules = [part for part in parts if isinstance(part, _BatchNorm) and part.track_running_stats]
    graphs = [part for part in parts if isinstance(part, fx.GraphModule)]
    nodes = [(part, node) for part in graphs for node in part.graph.nodes if _is_norm(node)]
    return [*map(ModuleNorm, modules), *(NodeNorm(part, node) for part, node in nodes)]


def _is_norm(node: fx.Node) -> bool:
    return (
        node.target is torch.ops.aten.batch_norm.default
        and isinstance(node.args[_MEAN], fx.Node)
        and len(node.args) > _MOMENTUM
    )


@contextmanager
def batch_statistics(norms: Sequence[Norm]) -> Iterator[Callable[[float], None]]:
    """Within it the norms use the statistics of each batch and take them into their own; what it yields sets with which
    share the next batch counts.
    """
    modules = [norm.module for norm in norms if isinstance(norm, ModuleNorm)]
    nodes = [norm.node for norm in norms if isinstance(norm, NodeNorm)]
    owners = {id(norm.owner): norm.owner for norm in norms if isinstance(norm, NodeNorm)}.values()
    kept = [(module.momentum, module.training) for module in modules], [node.args for node in nodes]

    def weigh(momentum: float) -> None:
        for norm in norms:
            norm.observe(momentum)
        for owner in owners:
            owner.recompile()

    try:
        yield weigh
    finally:
        for module, (momentum, mode) in zip(modules, kept[0], strict=True):
            module.momentum = momentum
            module.train(mode)
        for node, args in zip(nodes, kept[1], strict=True):
            node.args = args
        for owner in owners:
            owner.recompile()


@torch.no_grad()
def recalibrate_(
    module: nn.Module,
    batches: Iterable[ExampleInputs],
    *,
    like: nn.Module | None = None,
    group: ProcessGroup | None = None,
) -> int:
    """Give the batch norms of a truncated module the means and variances that its inputs now have.

    Their statistics were those of the dense model's outputs, of which a cut takes some variance away. With ``like``
    they move by what the cut changes over the batches: the mean by the difference, the variance by the ratio. What
    they have from training stays in them, where the batches are few or of another kind. Without it they become those of
    the batches. A batch counts by its rows; one of a single row, which has no variance, is passed over where there are
    others. Everything else stays in evaluation mode.

    Args:
        module: The truncated module.
        batches: Batches of inputs, each as ``example_inputs``.
        like: The module before the cut, where there is one: batch norms that no cut site feeds keep what they have.
        group: The processes that do so together, such as ``torch.distributed.group.WORLD``: each has the same module
            and gives its own batches, of which some may have none. By default this process alone.

    Returns:
        How many batch norms were given new statistics.

    Raises:
        CalibrationError: As ``calibrate`` does; the statistics are then as they were.
    """
    processes = in_group(group, CalibrationError)
    with processes.all_or_none(CalibrationError, "recalibrate_"):
        root = unwrap(module)
        if like is not None:
            unwrap(like)  # which refuses what is no module
        given = {"the argument like": like is not None} | whole_weights(processes, root, CalibrationError)
    check_same(processes, given, CalibrationError)
    as_first_(processes, root.buffers())
    called = module if processes.count == 1 else root  # not by way of DDP, which would wait for the others
    data = checked_batches(batches, processes=processes)
    return recalibrated_(called, data, None if like is None else observed(like, data, processes), processes)


@torch.no_grad()
def recalibrated_(
    module: nn.Module, data: Sequence[ExampleInputs], dense: Sequence[Statistics] | None, processes: Processes
) -> int:
    """As ``recalibrate_``, of arguments that were checked. dense: what was ``observed`` of the module before the cut;
    it counts where that has as many batch norms.
    """
    norms = norms_of(unwrap(module))
    now = observed(module, data, processes) if norms else []
    before = now if dense is None or len(dense) != len(norms) else dense
    given = 0
    for norm, (mean, variance), (old_mean, old_variance) in zip(norms, now, before, strict=True):
        own_mean, own_variance = norm.statistics
        if before is now:
            own_mean.copy_(mean)
            own_variance.copy_(variance)
        elif _alike(mean, old_mean) and _alike(variance, old_variance):
            continue
        else:
            own_mean.add_(mean - old_mean)
            trained = at_least_float32(own_variance)
            silent = (_SILENT * trained).clamp_min(_LEAST)
            own_variance.copy_(trained * (variance + silent) / (old_variance + silent))
        given += 1
    return given


def _alike(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-5)


@torch.no_grad()
def observed(module: nn.Module, data: Sequence[ExampleInputs], processes: Processes) -> list[Statistics]:
    """Mean and variance over the batches, of all processes, of what reaches each batch norm; the module stays."""
    rows = [batch_size(split_inputs(batch)) or 1 for batch in data]
    most = max(processes.gathered(max(rows, default=0)))
    used = [(number, batch) for number, batch in enumerate(data) if rows[number] > 1 or most == 1]
    norms = norms_of(unwrap(module))
    statistics = [each for norm in norms for each in norm.statistics]
    kept = [each.clone() for each in statistics]
    try:
        with processes.all_or_none(CalibrationError, "recalibrate_"):
            seen = _observe_all(module, used, norms, [rows[number] for number, _ in used])
        _average_(statistics, seen, processes)
        return [(mean.clone(), variance.clone()) for mean, variance in (norm.statistics for norm in norms)]
    finally:
        for each, value in zip(statistics, kept, strict=True):
            each.copy_(value)


def _observe_all(
    module: nn.Module, batches: Sequence[tuple[int, ExampleInputs]], norms: Sequence[Norm], rows: Sequence[int]
) -> int:
    """Give the norms the mean of what the batches have, each counted by its rows; how many rows that are."""
    statistics = [each for norm in norms for each in norm.statistics]
    for each in statistics:
        each.nan_to_num_(0.0, 0.0, 0.0)  # the first batch has a weight of 1, which leaves nothing but what is infinite
    seen = 0
    with batch_statistics(norms) as weigh:
        for (number, batch), more in zip(batches, rows, strict=True):
            seen += more
            weigh(more / seen)  # the mean over all rows so far
            with same_buffers(module, but=statistics):  # a streaming position, which forward moves, stays
                _observed(module, batch, number)
    return seen


def _average_(statistics: Sequence[Tensor], rows: int, processes: Processes) -> None:
    """The mean over the processes, each counted by the rows that it has seen."""
    if processes.count == 1:
        return
    total = torch.tensor(float(rows), dtype=torch.float64)
    sums = [each.double() * rows for each in statistics]
    processes.sum_([total, *sums])
    for each, summed in zip(statistics, sums, strict=True):
        each.copy_(summed / float(total))


def _observed(module: nn.Module, batch: ExampleInputs, number: int) -> None:
    try:
        call(module, batch, number)
    except CalibrationError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise CalibrationError(
            f"a batch norm has no statistics of calibration batch {number}, which has one row: give batches of two or "
            "more"
        ) from error
