"""Checksums that tell unlike tensors apart."""

from __future__ import annotations

import pytest
import torch

from dynrank_fx.processes import digest_of, unequal


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex128, torch.bool])
def test_equal_tensors_have_equal_digests_whatever_their_strides(dtype: torch.dtype) -> None:
    weight = torch.randn(8, 6).to(dtype)
    assert digest_of({"w": weight}) == digest_of({"w": weight.T.contiguous().T})


def test_what_is_unlike_has_another_digest() -> None:
    weight = torch.randn(8, 6)
    signs = weight * torch.tensor([1.0, -1, 1, -1, 1, 1])  # of two columns: an even number of bits at equal places
    rolled, transposed, rounded = weight.roll(1, 0), weight.T, weight.bfloat16().float()
    nudged = weight.clone()
    nudged[3, 3] = torch.nextafter(nudged[3, 3], torch.tensor(9.0))
    high = weight.clone()
    high.view(-1)[1::2].neg_()  # topmost bits of words of two, and an even number of them
    ends = torch.cat([weight, torch.zeros(1, 6)])
    every = [weight, high, ends, signs, rolled, transposed, rounded, nudged, -weight, weight.flip(0), weight[:4]]
    assert len({digest_of({"w": each})["w"] for each in every}) == len(every)


def test_the_first_name_that_differs_and_the_ranks() -> None:
    usual = digest_of({"a": torch.ones(2), "rank": 4})
    assert unequal([usual, usual]) is None
    assert unequal([usual, usual, {**usual, "rank": "5"}]) == ("rank", [2])
    assert unequal([{**usual, "a": 0}, usual, usual]) == ("a", [0])
    assert unequal([usual, {"a": usual["a"]}]) == ("rank", [1])


def test_views_and_odd_sizes_have_the_digests_of_their_values() -> None:
    many = torch.randn(3, 5, 7)
    for each in (many[1], many[:, 1], many[1, 1, 1], torch.empty(0), many[0, 0, 1:4].bfloat16()):
        assert digest_of({"w": each}) == digest_of({"w": each.clone()})
    large = torch.randn((1 << 18) + 3)
    moved = large.clone()
    moved[[5, 1 << 17]] = moved[[1 << 17, 5]]
    assert digest_of({"w": large}) != digest_of({"w": moved})
