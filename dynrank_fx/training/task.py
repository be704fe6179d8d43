"""What a net is trained on and how, one forward of it on a batch, and its evaluation."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property

import torch
import torch._functorch.config
from torch import Tensor, nn
from torch._dynamo.exc import FailOnRecompileLimitHit

from ..aliases import Args, Batch, Kwargs, Output
from ..errors import DynrankError, first_line
from ..processes import is_sharded, started
from ..tracing import Inputs, batch_size, evaluating, in_words, mapped, tensors, unwrap
from .settings import Settings
from .shares import Share, share_of

_END = object()
# What torch and Python raise where a batch does not fit the model.
_BY_A_BATCH = (RuntimeError, TypeError, ValueError, IndexError)


@dataclass(frozen=True)
class Task:
    """What is trained on: batches, how the model takes one, the loss (a mean), and what to report.

    metric: a mean over the batch, larger is better. Without eval_data nothing is evaluated. guard: a context around
    every use of what the user gave, which is told what that is. sharded: whether the data give each of several
    processes a share of its own already. Raises DynrankError for data that give their batches once.
    """

    train_data: Iterable[Batch]
    loss: Callable[[Output, Batch], Tensor]
    inputs: Callable[[Batch], Inputs]
    eval_data: Iterable[Batch] | None = None
    metric: Callable[[Output, Batch], float | Tensor] | None = None
    guard: Callable[[str], AbstractContextManager[object]] = nullcontext
    sharded: bool = False

    def __post_init__(self) -> None:
        for name, data in (("train_data()", self.train_data), ("eval_data()", self.eval_data)):
            if _gives_once(data):
                raise DynrankError(
                    f"{name} gave a {type(data).__name__}, whose batches can be gone through only once: give a list, a "
                    "DataLoader, or another object that starts anew every epoch"
                )

    @cached_property
    def train_share(self) -> Share:
        """What this process trains on. All processes ask for it together."""
        return share_of(self.train_data, "train_data()", started(), own=self.sharded)

    @cached_property
    def eval_share(self) -> Share:
        """What this process evaluates on, each entry in one process. All processes ask for it together."""
        return share_of(
            () if self.eval_data is None else self.eval_data, "eval_data()", started(), own=self.sharded, even=False
        )


def _gives_once(data: object) -> bool:
    """Whether it is a generator or another iterator of Python's own. A loader's may begin anew when it is asked."""
    return isinstance(data, Iterator) and type(data).__module__ in ("builtins", "itertools")


def batches_of(data: Iterable[Batch], task: Task, name: str) -> Iterator[Batch]:
    """The batches of the user's data, which are the user's code as well. What they draw first, they draw now."""
    with task.guard(name):
        batches = iter(data)
    return _each(batches, task, name)


def _each(batches: Iterator[Batch], task: Task, name: str) -> Iterator[Batch]:
    while True:
        with task.guard(name):
            try:
                batch = next(batches)
            except StopIteration:
                return
        yield batch


def apply(forward: nn.Module, task: Task, settings: Settings, batch: Batch) -> tuple[Output, Batch]:
    """The model's output, and the batch on the device."""
    with task.guard(f"moving a batch to {settings.device}"):
        batch = _on_device(batch, settings.device)
    args, kwargs = task.inputs(batch)
    with autocast(settings), keeping(settings), task.guard("the model"):
        try:
            return forward(*args, **kwargs), batch
        except FailOnRecompileLimitHit as error:
            raise DynrankError(
                f"the batches have more than {torch._dynamo.config.recompile_limit} shapes, each of which is compiled "
                "to a graph of its own: pad them to fewer, or train without compiling"
            ) from error
        except _BY_A_BATCH as error:
            _refuse_unused(unwrap(forward), error)
            _refuse_batch(unwrap(forward), args, kwargs, error)
            raise


def _on_device(batch: Batch, device: str | torch.device) -> Batch:
    """The batch there."""
    return mapped(lambda t: t.to(device, non_blocking=True), batch)


def _refuse_unused(net: nn.Module, error: Exception) -> None:
    """Say so if DistributedDataParallel waited for gradients that did not come."""
    if "Expected to have finished reduction" not in str(error):
        return
    trained = [name for name, parameter in net.named_parameters() if parameter.requires_grad]
    told = re.search(r"did not receive grad for rank \d+: (\d+)", str(error))
    which = trained[int(told[1])] if told and int(told[1]) < len(trained) else "a parameter"
    raise DynrankError(
        f"{which} takes no part in the loss, and several processes wait for its gradient: take it out of the model, or "
        "freeze it in model() by requires_grad_(False)"
    ) from error


def _refuse_batch(net: nn.Module, args: Args, kwargs: Kwargs, error: Exception) -> None:
    """Say so if the batch is at fault: then the net, run plainly, fails on it too."""
    try:
        with torch.no_grad():
            net(*args, **kwargs)
    except _BY_A_BATCH as why:
        given = [f"{t.dtype} {tuple(t.shape)}" for t in tensors((args, kwargs))]
        raise DynrankError(
            f"the model does not accept a batch of the data ({', '.join(given) or 'without a tensor'}): "
            f"{first_line(why)}"
        ) from error


def autocast(settings: Settings) -> AbstractContextManager[object]:
    """Autocast where the settings ask for it."""
    if settings.amp is None:
        return nullcontext()
    return torch.autocast(torch.device(settings.device).type, dtype=settings.amp)


def keeping(settings: Settings) -> AbstractContextManager[object]:
    """What is compiled inside keeps so much for the backward pass as the settings say."""
    if settings.activation_memory is None:
        return nullcontext()
    patched: AbstractContextManager[object] = torch._functorch.config.patch(
        activation_memory_budget=float(settings.activation_memory)
    )
    return patched


def loss_of(task: Task, settings: Settings, output: Output, batch: Batch) -> Tensor:
    """The loss of a batch. Raises DynrankError for what is no number."""
    with autocast(settings), task.guard("loss()"):
        loss = task.loss(output, batch)
    if not isinstance(loss, Tensor) or loss.ndim or not loss.is_floating_point() or loss.is_meta:
        raise DynrankError(
            f"the loss must be one number that depends on the model's output: loss() gave {in_words(loss)}"
        )
    return loss


def metric_of(task: Task, output: Output, batch: Batch, like: Tensor) -> Tensor:
    """The metric of a batch in float64 on the device of ``like``; not a number where there is none. Raises DynrankError
    for what is no number.
    """
    value: float | Tensor = float("nan")
    if task.metric is not None:
        with task.guard("metric()"):
            value = task.metric(output, batch)
    if isinstance(value, Tensor) and (value.numel() != 1 or value.is_complex() or value.is_meta):
        raise DynrankError(f"the metric must be one number, the mean over a batch: metric() gave {in_words(value)}")
    return torch.as_tensor(value, dtype=torch.float64, device=like.device).reshape(())


def _evaluated(net: nn.Module, task: Task) -> Iterator[tuple[Batch, bool]]:
    """The batches of eval_data(), and whether each counts: a net in parts is run by all processes together, so that
    those which have no more repeat their last one.
    """
    share = task.eval_share
    batches: Iterator[object] = batches_of(share, task, "eval_data()")
    batch: object = None
    while True:
        found = next(batches, _END)
        counts = found is not _END
        batch = found if counts else batch
        if not (share.processes.most(counts) if is_sharded(net) else counts):
            return
        if batch is None:
            raise DynrankError(
                "eval_data() has no batch for one of the processes, which share the net's parameters: give more, in "
                "smaller batches"
            )
        yield batch, counts


@torch.no_grad()
def evaluate(net: nn.Module, task: Task, settings: Settings) -> dict[str, float | None]:
    """Mean loss and metric over eval_data, batches weighted by their size, of all processes; empty without eval_data.

    Eager: an evaluation is a small part of an epoch, and compiling it would cost one more graph per phase.
    """
    if task.eval_data is None:
        return {}
    sums = torch.zeros(3, dtype=torch.float64, device=settings.device)
    with evaluating(net):
        for batch, counts in _evaluated(net, task):
            output, batch = apply(net, task, settings, batch)
            size = (batch_size(((), {"batch": batch})) or 1) * counts
            loss = loss_of(task, settings, output, batch).double()
            sums += size * torch.stack([loss, metric_of(task, output, batch, loss), torch.ones_like(loss)])
    task.eval_share.processes.sum_([sums])
    if sums[2] == 0:
        raise DynrankError("eval_data() gave no batch: leave it out, or see that it can be gone through every epoch")
    loss, metric, _ = (sums / sums[2]).tolist()
    return {"eval_loss": loss, "eval_metric": metric if task.metric else None}
