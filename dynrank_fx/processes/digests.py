"""Whether several processes hold the same: a checksum of every tensor, compared by name."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

Digest: TypeAlias = dict[str, object]
"""A checksum or a plain value, by name."""

_CHUNK = 1 << 17  # words at a time, so that a checksum needs no second copy of a weight, and what it does need is near
_FACTOR = 6364136223846793005  # odd, hence no bit of a word is lost; of Knuth's MMIX generator


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
    """A sum over all bits modulo 2⁶⁴, each word of eight bytes times a number that its place decides: two words
    exchanged, or a rotation of the columns, give another. So do changed signs, even of an even number: the upper half
    of each product goes into the lower one, or a change of topmost bits alone would add up to 2⁶⁴.
    """
    words = _words(tensor.detach().contiguous().view(-1))
    places, total = _places(words.device), torch.full((), tensor.numel(), device=words.device)
    for chunk in words.split(_CHUNK):
        product = chunk * places[: len(chunk)]
        total = total * _FACTOR + product.bitwise_xor_(product >> 29).sum()
    return total


def _words(flat: Tensor) -> Tensor:
    """Its bytes, eight in a word, the last one filled up with zeros."""
    octets = flat.view(torch.uint8)
    if len(octets) % 8 or octets.storage_offset() % 8:
        octets = torch.nn.functional.pad(octets, (0, -len(octets) % 8)).clone()
    return octets.view(torch.int64)


@functools.cache
def _places(device: torch.device) -> Tensor:
    mixed = torch.arange(1, _CHUNK + 1, device=device) * _FACTOR
    return mixed ^ (mixed >> 29) | 1


def _read(sums: Sequence[Tensor]) -> list[int]:
    """The numbers, with one copy from each device."""
    read = [0] * len(sums)
    for device in dict.fromkeys(each.device for each in sums):
        at = [i for i, each in enumerate(sums) if each.device == device]
        for i, value in zip(at, torch.stack([sums[i] for i in at]).tolist(), strict=True):
            read[i] = value
    return read
