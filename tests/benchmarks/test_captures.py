"""Graphs by setting: one for each, also where batches are ragged and evaluation comes between, and then none."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from benchmarks.captures import captured, nets


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("which", [0, 1], ids=["attention", "convolution"])
def test_every_setting_is_compiled_once_however_often_it_comes_again(which: int) -> None:
    _, model, batch = nets(quick=True)[which]
    first, later, breaks = captured(model, batch, 6, "eager")
    assert len(first) == 2 * 2 * 2, "phases, modes and sizes of a batch"
    assert set(first.values()) == {1}
    assert set(later.values()) == {0}
    assert not breaks
