"""What a net is trained on and how, one forward of it on a batch, and its evaluation."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch.utils import _pytree as pytree

from ..aliases import Args, Batch, Kwargs, Output
from ..errors import DynrankError, first_line
from ..tracing import Inputs, batch_size, evaluating, unwrap
from .settings import Settings

# What torch and Python raise where a batch does not fit the model.
_BY_A_BATCH = (RuntimeError, TypeError, ValueError, IndexError)


@dataclass(frozen=True)
class Task:
    """What is trained on: batches, how the model takes one, the loss (a mean), and what to report.

    metric: a mean over the batch, larger is better. Without eval_data nothing is evaluated. Raises DynrankError for
    data that give their batches once.
    """

    train_data: Iterable[Batch]
    loss: Callable[[Output, Batch], Tensor]
    inputs: Callable[[Batch], Inputs]
    eval_data: Iterable[Batch] | None = None
    metric: Callable[[Output, Batch], float | Tensor] | None = None

    def __post_init__(self) -> None:
        for name, data in (("train_data()", self.train_data), ("eval_data()", self.eval_data)):
            if _gives_once(data):
                raise DynrankError(
                    f"{name} gave a {type(data).__name__}, whose batches can be gone through only once: give a list, a "
                    "DataLoader, or another object that starts anew every epoch"
                )


def _gives_once(data: object) -> bool:
    """Whether it is a generator or another iterator of Python's own. A loader's may begin anew when it is asked."""
    return isinstance(data, Iterator) and type(data).__module__ in ("builtins", "itertools")


def apply(forward: nn.Module, task: Task, settings: Settings, batch: Batch) -> tuple[Output, Batch]:
    """The model's output, and the batch on the device."""
    batch = _on_device(batch, settings.device)
    args, kwargs = task.inputs(batch)
    with autocast(settings):
        try:
            return forward(*args, **kwargs), batch
        except FailOnRecompileLimitHit as error:
            raise DynrankError(
                f"the batches have more than {torch._dynamo.config.recompile_limit} shapes, each of which is compiled "
                "to a graph of its own: pad them to fewer, or train without compiling"
            ) from error
        except _BY_A_BATCH as error:
            _refuse_batch(unwrap(forward), args, kwargs, error)
            raise


def _on_device(batch: Batch, device: str | torch.device) -> Batch:
    """The batch there. pytree would not look into a mapping of another kind than a dict, as tokenizers give them."""

    def moved(values: object) -> object:
        return pytree.tree_map_only(Tensor, lambda t: t.to(device, non_blocking=True), values)

    if not isinstance(batch, MutableMapping) or not pytree.tree_is_leaf(batch):
        return moved(batch)
    twin = copy.copy(batch)
    for key, value in batch.items():
        twin[key] = moved(value)
    return twin


def _refuse_batch(net: nn.Module, args: Args, kwargs: Kwargs, error: Exception) -> None:
    """Say so if the batch is at fault: then the net, run plainly, fails on it too."""
    try:
        with torch.no_grad():
            net(*args, **kwargs)
    except _BY_A_BATCH as why:
        given = [f"{t.dtype} {tuple(t.shape)}" for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        raise DynrankError(
            f"the model does not accept a batch of the data ({', '.join(given) or 'without a tensor'}): "
            f"{first_line(why)}"
        ) from error


def autocast(settings: Settings) -> contextlib.AbstractContextManager[object]:
    """Autocast where the settings ask for it."""
    if settings.amp is None:
        return contextlib.nullcontext()
    return torch.autocast(torch.device(settings.device).type, dtype=settings.amp)


def number(metric: float | Tensor | None, like: Tensor) -> Tensor:
    """A metric in float64 on the device of ``like``; not a number where there is none."""
    return torch.as_tensor(float("nan") if metric is None else metric, dtype=torch.float64, device=like.device)


@torch.no_grad()
def evaluate(net: nn.Module, task: Task, settings: Settings) -> dict[str, float | None]:
    """Mean loss and metric over eval_data, batches weighted by their size; empty without eval_data.

    Eager: an evaluation is a small part of an epoch, and compiling it would cost one more graph per phase.
    """
    if task.eval_data is None:
        return {}
    sums, count = torch.zeros(2, dtype=torch.float64, device=settings.device), 0
    with evaluating(net):
        for batch in task.eval_data:
            output, batch = apply(net, task, settings, batch)
            size = batch_size(((), dict(batch) if isinstance(batch, Mapping) else {"batch": batch})) or 1
            with autocast(settings):
                loss = task.loss(output, batch).double()
            sums += size * torch.stack([loss, number(task.metric(output, batch) if task.metric else None, loss)])
            count += size
    if count == 0:
        raise DynrankError("eval_data() gave no batch: leave it out, or see that it can be gone through every epoch")
    loss, metric = (sums / count).tolist()
    return {"eval_loss": loss, "eval_metric": metric if task.metric else None}
