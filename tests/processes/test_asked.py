"""What a caller asks several processes for: a group, the same model in all, and the values of the first."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from several import in_processes
from torch import nn
from torch.distributed.tensor import distribute_module, init_device_mesh

from dynrank_fx.errors import CalibrationError, PlanError
from dynrank_fx.processes import ALONE, as_first_, check_same, in_group, whole_weights


def _said(call: Any) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def _everything(rank: int) -> dict[str, Any]:
    both = in_group(dist.group.WORLD, PlanError)
    done: dict[str, Any] = {"count": both.count}
    own = [torch.full((2, 3), float(rank)), torch.tensor(rank), torch.full((3, 2), rank + 0.1).T]
    as_first_(both, own)
    done["values"] = [each.tolist() for each in own]
    check_same(both, {"a": torch.ones(2), "b": 3}, PlanError)
    done["unequal"] = _said(lambda: check_same(both, {"a": torch.ones(2), "b": rank}, PlanError))
    alone = dist.new_group([0])
    done["of another group"] = _said(lambda: in_group(alone, PlanError))
    net = nn.Linear(4, 4)
    done["whole"] = list(whole_weights(both, net, PlanError))
    distribute_module(net, init_device_mesh("cpu", (2,)))
    done["in parts"] = _said(lambda: whole_weights(both, net, CalibrationError))
    return done


def test_two_processes() -> None:
    first, second = in_processes(_everything)
    for done in (first, second):
        assert done["count"] == 2
        assert done["values"] == [[[0.0] * 3] * 2, 0, [pytest.approx([0.1] * 3)] * 2]
        assert done["unequal"].startswith("PlanError: b is not the same in all processes, in process 1 of 2 it is anot")
        assert done["whole"] == ["weight", "bias"]
        assert done["in parts"].startswith("CalibrationError: weight lies in parts over the processes, and only whole")
    assert first["of another group"] == "nothing"
    assert second["of another group"].startswith("PlanError: group is ")


def test_alone_there_is_nothing_to_agree_on() -> None:
    value = torch.ones(2)
    as_first_(ALONE, [value])
    check_same(in_group(None, PlanError), {"value": value}, PlanError)
    assert whole_weights(ALONE, nn.Linear(2, 2), PlanError) == {}
    with pytest.raises(PlanError, match=r"^group is 'world', and no group of processes that this one is in"):
        in_group("world", PlanError)  # type: ignore[arg-type]
