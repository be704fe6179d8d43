"""Whether processes that are asked to do something together can: they are of a group, and are given the same."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import DynrankError
from .agreement import agree
from .digests import digest_of
from .together import ALONE, Processes


def in_group(group: dist.ProcessGroup | None, error: type[DynrankError]) -> Processes:
    """The processes of a group that a caller gave; ``ALONE`` for None. Raises such an error for what is no group."""
    if group is None:
        return ALONE
    if not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        raise error(
            f"group is {group!r}, and no group of processes that this one is in: give torch.distributed.group.WORLD, "
            "or leave it out"
        )
    return Processes(group)


def check_same(processes: Processes, values: Mapping[str, object], error: type[DynrankError]) -> None:
    """Raises such an error, in all processes, for the first of these values that is not the same in all."""
    if processes.count > 1:
        when = "give all of them the same model and the same arguments, and to each its own data"
        agree(processes, digest_of(values), error, when)


def whole_weights(processes: Processes, net: nn.Module, error: type[DynrankError]) -> dict[str, object]:
    """The parameters, for ``check_same``. Raises such an error where one lies in parts over several processes."""
    if processes.count == 1:
        return {}
    from torch.distributed.tensor import DTensor

    for name, parameter in net.named_parameters():
        if isinstance(parameter, DTensor):
            raise error(
                f"{name} lies in parts over the processes, and only whole weights can be cut: give a net that has "
                "loaded the full state_dict (get_model_state_dict with full_state_dict=True)"
            )
    return dict(net.named_parameters())


@torch.no_grad()
def as_first_(processes: Processes, tensors: Iterable[Tensor]) -> None:
    """Give each tensor, in place, the values that it has in the first process, bit by bit."""
    if processes.count == 1:
        return
    own = list(tensors)
    first = processes.from_one(0, lambda: own, DynrankError, "sending tensors")
    if not processes.first:
        for each, value in zip(own, first, strict=True):
            each.copy_(value)
