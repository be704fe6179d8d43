"""Whether several processes hold the same: a checksum of every tensor, compared by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

Digest: TypeAlias = dict[str, object]
"""A checksum or a plain value, by name."""

_CHUNK = 1 << 20  # entries at a time, so that a checksum needs no second copy of a weight
_FACTOR = 6364136223846793005  # odd, hence no bit of an entry is lost; of Knuth's MMIX generator


def digest_of(values: Mapping[str, object]) -> Digest:
    """What tells these values from others: of tensors a checksum of their bits and places, of anything else its text.

    Tensors on one device are read there, and one number each comes back.
    """
    sums = {name: _checksum(value) for name, value in values.items() if isinstance(value, Tensor)}
    read = dict(zip(sums, _read(list(sums.values())), strict=True))
    return {name: read[name] if name in read else repr(value) for name, value in values.items()}


def unequal(digests: Sequence[Digest]) -> tuple[str, list[int]] | None:
    """The first name of which not all have the same, with the ranks that differ from most; None where all agree."""
    for name in dict.fromkeys(name for digest in digests for name in digest):
        values = [digest.get(name) for digest in digests]
        usual = max(values, key=values.count)
        others = [rank for rank, value in enumerate(values) if value != usual]
        if others:
            return name, others
    return None


@torch.no_grad()
def _checksum(tensor: Tensor) -> Tensor:
    """A sum over all bits, each entry times a number that its place decides, modulo 2⁶⁴: a changed sign, two entries
    exchanged, or a rotation of the columns give another.
    """
    flat = tensor.detach().contiguous().view(-1)
    bits = flat.view(torch.uint8) if flat.element_size() not in (1, 2, 4, 8) or flat.is_complex() else flat
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[bits.element_size()]
    words, total = bits.view(whole), torch.zeros((), dtype=torch.int64, device=flat.device)
    for start in range(0, len(words), _CHUNK):
        chunk = words[start : start + _CHUNK].long()
        places = torch.arange(start + 1, start + 1 + len(chunk), device=flat.device)
        mixed = places * _FACTOR
        total += (chunk * (mixed ^ (mixed >> 29) | 1)).sum()
    return total


def _read(sums: Sequence[Tensor]) -> list[int]:
    """The numbers, with one copy from each device."""
    read = [0] * len(sums)
    for device in dict.fromkeys(each.device for each in sums):
        at = [i for i, each in enumerate(sums) if each.device == device]
        for i, value in zip(at, torch.stack([sums[i] for i in at]).tolist(), strict=True):
            read[i] = value
    return read
