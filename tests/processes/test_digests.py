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
    every = [weight, signs, rolled, transposed, rounded, nudged, -weight, weight.flip(0), weight[:4]]
    assert len({digest_of({"w": each})["w"] for each in every}) == len(every)


def test_the_first_name_that_differs_and_the_ranks() -> None:
    usual = digest_of({"a": torch.ones(2), "rank": 4})
    assert unequal([usual, usual]) is None
    assert unequal([usual, usual, {**usual, "rank": "5"}]) == ("rank", [2])
    assert unequal([{**usual, "a": 0}, usual, usual]) == ("a", [0])
    assert unequal([usual, {"a": usual["a"]}]) == ("rank", [1])
