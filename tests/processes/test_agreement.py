"""What several processes hold is compared, and a difference named."""

from __future__ import annotations

import pytest
from several import in_processes

from dynrank_fx.errors import TransitionError
from dynrank_fx.processes import ALONE, agree, started


def _compared(rank: int) -> tuple[str, str]:
    agree(started(), {"a": 1, "b": "x"}, TransitionError, "")
    said = []
    for digest in ({"a": 1, "b": rank, "c": rank}, {"a": 1, "b": 2} if rank else {"b": 2, "a": 1}):
        with pytest.raises(TransitionError) as error:
            agree(started(), digest, TransitionError, "look there")
        said.append(str(error.value))
    return said[0], said[1]


def test_a_difference_names_the_first_value_and_the_process() -> None:
    first, second = in_processes(_compared, count=3)[:2]
    assert first == second
    assert first[0] == "b is not the same in all processes, in processes 1, 2 of 3 it is another: look there"
    assert first[1].startswith("the order of what is compared is not the same in all processes")


def test_a_process_alone_agrees() -> None:
    agree(ALONE, {"a": object()}, TransitionError, "")
