"""What several processes do together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from several import in_processes

from dynrank_fx.errors import TransitionError
from dynrank_fx.processes import ALONE, started


def _refused(rank: int, value: object) -> object:
    raise ValueError(f"not {value} in {rank}")


def _everything(rank: int) -> dict[str, Any]:
    both = started()
    done: dict[str, Any] = {"count": both.count, "first": both.first}
    numbers, others = torch.full((3,), float(rank)), torch.full((2, 2), rank + 1)
    both.sum_([numbers, others])
    done["summed"] = numbers.tolist(), others.tolist()
    done["most"] = both.most(rank), both.most(rank == 5)
    done["gathered"] = both.gathered({"rank": rank})

    def made() -> tuple[torch.Tensor, dict[str, object]]:
        last = torch.arange(24.0).view(1, 2, 3, 4).to(memory_format=torch.channels_last)
        others = {"half": torch.ones(3, dtype=torch.bfloat16), "numpy": torch.tensor([7], dtype=torch.uint32)}
        return last + rank, {"step": torch.tensor(rank), "mu": 0.5, **others}

    value, state = both.from_one(1, made, TransitionError, "making")
    done["sent"] = value.tolist(), value.stride(), state["step"], state["mu"], str(state["half"].dtype)
    done["sent too"] = state["numpy"].tolist()
    for name, block in (
        ("from_one", lambda: both.from_one(1, lambda: _refused(rank, "so"), TransitionError, "making")),
        ("all_or_none", lambda: _together_or_not(rank)),
    ):
        try:
            block()
            done[name] = "no error"
        except Exception as error:
            done[name] = f"{type(error).__name__}: {error}"
    with both.all_or_none(TransitionError, "nothing"):
        pass
    both.wait()
    return done


def _together_or_not(rank: int) -> None:
    with started().all_or_none(TransitionError, "the work"):
        if rank == 1:
            _refused(rank, "there")


def test_two_processes_do_as_one() -> None:
    first, second = in_processes(_everything)
    assert (first["count"], first["first"], second["first"]) == (2, True, False)
    for done in (first, second):
        assert done["summed"] == ([1.0] * 3, [[3, 3], [3, 3]])
        assert done["most"] == (1, 0)
        assert done["gathered"] == [{"rank": 0}, {"rank": 1}]
        value, strides, step, mu, half = done["sent"]
        assert value == (torch.arange(24.0).view(1, 2, 3, 4) + 1).tolist()
        assert strides == torch.empty(1, 2, 3, 4).to(memory_format=torch.channels_last).stride()
        assert (int(step), mu, half, done["sent too"]) == (1, 0.5, "torch.bfloat16", [7])
    why = "failed in process 1 of 2, and nothing was done in any: ValueError: not"
    assert first["from_one"] == f"TransitionError: making {why} so in 1"
    assert second["from_one"] == "ValueError: not so in 1"
    assert first["all_or_none"] == f"TransitionError: the work {why} there in 1"
    assert second["all_or_none"] == "ValueError: not there in 1"


def test_alone_everything_is_as_it_is() -> None:
    assert started() == ALONE
    value = torch.ones(2)
    ALONE.sum_([value])
    ALONE.wait()
    assert value.tolist() == [1, 1]
    assert ALONE.gathered(3) == [3]
    assert ALONE.most(2) == 2
    assert ALONE.from_one(0, lambda: 4, TransitionError, "") == 4
    with pytest.raises(ValueError, match="not here"), ALONE.all_or_none(TransitionError, ""):
        _refused(0, "here")
