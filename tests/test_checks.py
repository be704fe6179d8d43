"""What counts as a number that was asked for, and what is a slip."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch._inductor

import dynrank_fx as dr
from dynrank_fx.checks import COMPILE_MODES, is_number, is_share, is_whole, names_of


def test_modes_of_torch_compile_are_torchs_own() -> None:
    assert set(COMPILE_MODES) <= set(torch._inductor.list_mode_options())


@pytest.mark.parametrize("value", [1, 7, np.int64(3)])
def test_whole_numbers(value: object) -> None:
    assert is_whole(value, 1)
    assert is_number(value)


@pytest.mark.parametrize("value", [0, -1, 2.0, 2.5, True, "2", None, [2]])
def test_what_is_no_whole_number_of_1_or_more(value: object) -> None:
    assert not is_whole(value, 1)


@pytest.mark.parametrize("value", [0.25, 1, np.float32(0.5), Fraction(1, 3)])
def test_shares(value: object) -> None:
    assert is_share(value)


@pytest.mark.parametrize("value", [0, 1.5, -0.5, math.nan, math.inf, True, "0.5", None])
def test_what_is_no_share(value: object) -> None:
    assert not is_share(value)


def test_bounds_belong_to_the_numbers_within() -> None:
    assert [value for value in (-1, 0, 0.5, 1, 2, math.inf) if is_number(value, 0, 1)] == [0, 0.5, 1]


def test_members_are_named_as_they_are_written() -> None:
    assert names_of(dr.Phase) == "Phase.FULL, Phase.LOW, Phase.ADAPTOR"
