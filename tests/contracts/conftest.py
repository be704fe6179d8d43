"""What all contracts share: the devices, and one way of attention."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from grid import fast_path


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True, scope="module")
def one_way_of_attention() -> Iterator[None]:
    """The fast path differs from the ordinary one by rounding, and hides its FLOPs."""
    with fast_path(enabled=False):
        yield
