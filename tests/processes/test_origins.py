"""Parts of unlike wholes are told by some of their entries, as long as these are there."""

from __future__ import annotations

from typing import Any

import torch
from several import in_processes
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from dynrank_fx.processes import ALONE, entries_of, of_unlike_wholes, started


def _found(rank: int) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for axis in (Shard(0), Shard(1), Replicate()):
        for name, shape in (("matrix", (7, 5)), ("large", (90, 31)), ("one row", (1, 3)), ("kernel", (3, 4, 2, 2))):
            for unlike in (False, True):
                torch.manual_seed(rank if unlike else 0)
                whole = torch.randn(shape)
                part = distribute_tensor(whole, init_device_mesh("cpu", (2,)), [axis], src_data_rank=None)
                entries = entries_of({name: whole})
                found[name, str(axis), unlike] = of_unlike_wholes(started(), {name: part}, entries)
                if rank == 1:  # it is loaded, as the first has it
                    part.to_local().add_(1)
                assert of_unlike_wholes(started(), {name: part}, entries) is None or name == "one row"
    found["none in one"] = of_unlike_wholes(started(), {"a": part}, entries_of({"a": whole} if rank else {}))
    return found


def test_parts_of_unlike_wholes() -> None:
    for found in in_processes(_found):
        assert found.pop("none in one") is None
        for (name, axis, unlike), told in found.items():
            assert told == ((name, [1]) if unlike else None), (name, axis)


def test_entries_are_spread_over_a_tensor_that_has_any() -> None:
    entries = entries_of({"a": torch.arange(1000.0), "empty": torch.zeros(0), "meta": torch.zeros(3, device="meta")})
    assert list(entries) == ["a"]
    assert len(entries["a"]) == 64
    assert (entries["a"][0], entries["a"][-1]) == (0, 999)
    assert of_unlike_wholes(ALONE, {"a": torch.arange(1000.0)}, entries) is None
