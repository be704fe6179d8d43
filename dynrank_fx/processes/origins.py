"""Whether what lies in parts over several processes is of one whole: ``fully_shard`` sends no weights, and each process
keeps a part of its own. So a few entries of each tensor are kept from when it was whole. Processes had unlike ones
where these differ and all still have them; weights that were loaded since are others.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .digests import digest_of, unequal
from .shards import Outline, own, part_as
from .together import Processes

_ENTRIES = 64


def entries_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Some entries of each whole tensor, from its first to its last; none of one without memory."""
    there = {name: tensor.detach() for name, tensor in tensors.items() if not tensor.is_meta and tensor.numel()}
    return {name: tensor.reshape(-1)[_places(tensor).to(tensor.device)].cpu() for name, tensor in there.items()}


def of_unlike_wholes(
    processes: Processes, parts: Mapping[str, Tensor], entries: Mapping[str, Tensor]
) -> tuple[str, list[int]] | None:
    """The first name of which the processes' parts are of other wholes, with the ranks that differ from most; None
    where none is, or where it cannot be told. All processes call this.

    entries: what ``entries_of`` gave when each had the whole.
    """
    kept = {n: entries[n] for n, part in parts.items() if n in entries and _are_in(part, entries[n])}
    told = processes.gathered(digest_of(kept))
    in_all = [name for name in told[0] if all(name in each for each in told)]
    return unequal([{name: each[name] for name in in_all} for each in told])


def _places(tensor: Tensor) -> Tensor:
    count = tensor.numel()
    return torch.linspace(0, count - 1, min(_ENTRIES, count), dtype=torch.float64).round().long()


@torch.no_grad()
def _are_in(part: Tensor, entries: Tensor) -> bool:
    """Whether this process's part of a tensor has the entries that fall into it."""
    places, outline, local = _places(part), Outline.of(part), own(part)
    if len(places) != len(entries):
        return False
    index, here = list(torch.unravel_index(places, part.shape)), torch.ones(len(places), dtype=torch.bool)
    for axis in {axis for axis, _ in outline.cuts} if outline is not None else ():
        mine = own(part_as(torch.arange(part.shape[axis]), part, axis=0)).cpu()
        here &= torch.isin(index[axis], mine)
        index[axis] = torch.searchsorted(mine, index[axis])
    found = local[tuple(each[here].to(local.device) for each in index)].cpu()
    return torch.equal(found, entries[here].to(found.dtype))
