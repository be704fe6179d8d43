"""The parts of a training that go into a checkpoint, and their tensors by name."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..errors import StoreError
from ..phases import Optimizers, averages_of, optimizers_in, state_of
from ..processes import is_part
from ..rewrite import plan_of
from ..tracing import unwrap
from .facts import check_scheduler
from .phases import Phases


@dataclass(frozen=True)
class Parts:
    """What goes into a checkpoint, or is brought to one."""

    root: nn.Module
    averages: Sequence[nn.Module]
    optimizers: Sequence[Optimizer]
    schedulers: Sequence[LRScheduler]

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Those that have tensors, by what their names begin with."""
        return {"net": self.root, **{f"average.{i}": each for i, each in enumerate(self.averages)}}

    @property
    def names(self) -> dict[int, str]:
        """The names of the net's parameters, by their ids."""
        state_of(self.root)  # FSDP may hold other parameters since the last forward, until it is asked for these
        return {id(parameter): name for name, parameter in self.root.named_parameters()}


def parts_of(
    net: nn.Module,
    optimizer: Optimizers | None,
    phases: Phases | None,
    lr_scheduler: LRScheduler | Sequence[LRScheduler] | None,
) -> Parts:
    """The parts that were given; those of the phases where none were. Raises PlanError, StoreError, TransitionError and
    ScheduleError for what is none.
    """
    root = unwrap(net)
    plan_of(root)
    if not isinstance(phases, Phases | None):
        raise StoreError(f"phases is {phases!r}: give the Phases at work, or leave it out")
    if phases is not None and unwrap(phases.net) is not root:
        raise StoreError(
            "the Phases are of another net than the one that was given: give the net that they were made with"
        )
    its = () if phases is None or phases.lr_scheduler is None else (phases.lr_scheduler,)
    given = its if lr_scheduler is None else lr_scheduler if isinstance(lr_scheduler, list | tuple) else (lr_scheduler,)
    optimizers = phases.optimizers if phases is not None and optimizer is None else optimizers_in(optimizer)
    for each in given:
        if each is None:
            raise StoreError(
                "lr_scheduler has a None in it: give a learning-rate scheduler, several in a list, or leave it out"
            )
        check_scheduler(each, optimizers)
    return Parts(
        root,
        () if phases is None else averages_of(phases.averages, root),
        optimizers,
        tuple(given),
    )


def tensors_of(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor by every name that it has."""
    for prefix, module in modules.items():
        for name, tensor in state_of(module).items():
            yield f"{prefix}.{name}", tensor


def stored_in(modules: Mapping[str, nn.Module]) -> tuple[dict[str, Tensor], dict[str, list[int]], dict[str, str]]:
    """Every tensor once; the shapes by all names; which names are further ones of which tensor."""
    first, stored, shapes, aliases = dict[int, str](), dict[str, Tensor](), dict[str, list[int]](), dict[str, str]()
    for name, tensor in tensors_of(modules):
        shapes[name] = list(tensor.shape)
        if id(tensor) in first:
            aliases[name] = first[id(tensor)]
        else:
            first[id(tensor)], stored[name] = name, tensor
    return stored, shapes, aliases


def of_all(
    tensors: Mapping[str, Tensor], moments: Mapping[str, Tensor], ignored: Collection[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Those of which all processes have the same, or a shard each. Every process may have buffers of its own, and
    parameters that DistributedDataParallel was told to ignore.
    """
    endings = tuple(f".{name}" for name in ignored)
    shared = {name: t for name, t in tensors.items() if isinstance(t, Parameter) or is_part(t)}
    ours, theirs = ({n: t for n, t in each.items() if not n.endswith(endings)} for each in (shared, moments))
    return ours, theirs
