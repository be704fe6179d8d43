"""What several processes hold is compared, and a difference named."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
from several import in_processes

from dynrank_fx.errors import DynrankError, TransitionError
from dynrank_fx.processes import ALONE, Processes, agree, started


def _compared(rank: int) -> tuple[str, ...]:
    agree(started(), {"a": 1, "b": "x"}, TransitionError, "")
    said = []
    for digest in ({"a": 1, "b": rank, "c": rank}, {"a": 1, "b": 2} if rank else {"b": 2, "a": 1}):
        with pytest.raises(TransitionError) as error:
            agree(started(), digest, TransitionError, "look there")
        said.append(str(error.value))
    hurried = Processes(torch.distributed.new_group(timeout=timedelta(seconds=1)))
    if rank == 0:
        with pytest.raises(DynrankError) as waited:
            agree(hurried, {}, TransitionError, "")
        said.append(str(waited.value))
    started().wait()
    return tuple(said)


def test_a_difference_names_the_first_value_and_the_process() -> None:
    first, second = in_processes(_compared, count=3)[:2]
    assert first[:2] == second
    assert first[2].startswith("process 0 of 3 waited in vain for the others")
    assert first[0] == "b is not the same in all processes, in processes 1, 2 of 3 it is another: look there"
    assert first[1].startswith("the order of what is compared is not the same in all processes")


def test_a_process_alone_agrees() -> None:
    agree(ALONE, {"a": object()}, TransitionError, "")
