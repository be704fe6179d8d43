"""Times of sites: where they are kept, and the curve that they give."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dynrank_fx as dr
from dynrank_fx.compression import SiteTimes
from dynrank_fx.compression.site_times import paying_limit
from dynrank_fx.plan import PlannedSite
from dynrank_fx.timing import Pair


def test_a_site_is_timed_where_it_runs_and_a_cache_keeps_its_times(tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense, x = nn.Sequential(nn.Linear(256, 256)), torch.randn(16, 256)
    sites, cache = dr.plan_of(dr.transform(dense, (x,))).sites, tmp_path / "times.json"
    times = SiteTimes(cache=cache, repeats=5)
    pair = times.pair(sites, paying_limit(sites))
    assert pair is not None
    assert pair.first > 0
    times.save()
    again = SiteTimes(cache=cache)
    again._measured = None  # type: ignore[method-assign,assignment]
    assert again.pair(sites, paying_limit(sites)) == pair
    data = cache.read_text()
    times = json.loads(data)["times"]
    assert SiteTimes(cache=cache)._known == times
    digit = data.index("[") + 5
    flipped = data[:digit] + chr(ord(data[digit]) ^ 1) + data[digit + 1 :]
    for damaged in ("no JSON", flipped, json.dumps(times), "[]", "3", json.dumps({"times": times}), '{"times": 3}'):
        cache.write_text(damaged)
        assert SiteTimes(cache=cache)._known == {}, "it is measured anew"


def planned(model: nn.Module, x: torch.Tensor, **choices: Any) -> tuple[PlannedSite, ...]:
    return dr.plan_of(dr.transform(model, (x,), rank=dr.Fixed(2), allow_unprofitable=True, **choices)).sites


class QK(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(24, 16), nn.Linear(24, 40)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q(x).sum(-1) + self.k(x).sum(-1)


@pytest.mark.parametrize(
    ("model", "x", "choices"),
    [
        (nn.Linear(30, 50), torch.randn(2, 30), {}),
        (nn.Conv2d(8, 16, 3, groups=2), torch.randn(2, 8, 9, 9), {}),
        (nn.Conv2d(8, 16, 3), torch.randn(2, 8, 9, 9), {"conv_layout": dr.TuckerLayout}),
        (nn.Conv2d(8, 16, 3), torch.randn(2, 8, 9, 9), {"conv_layout": dr.CPLayout}),
        (QK(), torch.randn(2, 24), {"share_inputs": True}),
    ],
)
def test_the_last_rank_that_saves_parameters_is_found(
    model: nn.Module, x: torch.Tensor, choices: dict[str, Any]
) -> None:
    """By counting at every rank. Sites that share a factor have one right for all."""
    rows = planned(model, x, **choices)
    layout, dense = rows[0].layout, sum(math.prod(row.site.shape) for row in rows)

    def params(rank: int) -> int:
        shapes = [layout.factor_shapes(row.site.shape, rank) for row in rows]
        return sum(map(math.prod, shapes[0])) + sum(math.prod(left) for left, *_ in shapes[1:])

    ranks = range(1, layout.max_rank((sum(row.site.shape[0] for row in rows), *rows[0].site.shape[1:])) + 1)
    assert paying_limit(rows) == max(rank for rank in ranks if params(rank) < dense)


class Said(SiteTimes):
    """Dense takes 2 s, and a rank r takes r / 10 s, but for the ranks that a test says."""

    def __init__(self, said: dict[int, float | None]) -> None:
        super().__init__(cache=None)
        self.said = said

    def _measured(self, rows: Any, rank: int) -> Pair | None:
        seconds = self.said.get(rank, rank / 10)
        return None if seconds is None else Pair(2.0, seconds, seconds / 2)


def test_the_curve_goes_straight_between_measured_ranks_and_never_falls() -> None:
    rows = planned(nn.Linear(32, 32, bias=False), torch.randn(2, 32))
    assert paying_limit(rows) == 15  # 15 · 64 < 32 · 32; measured at 1, 3, 5, 7, 9, 11, 13, 15
    cost = Said({}).cost(rows, 4.0)
    assert cost is not None
    assert cost.dense == pytest.approx(2.0 / 4.0)
    assert [cost.at(rank) for rank in (1, 4, 15)] == pytest.approx([0.1 / 4, 0.4 / 4, 1.5 / 4])
    bumpy = Said({5: 1.0}).cost(rows, 4.0)  # one slow moment
    assert bumpy is not None
    times = [bumpy.at(rank) for rank in range(1, 16)]
    assert times == sorted(times)
    assert bumpy.at(9) == pytest.approx(1.0 / 4)
    assert Said({7: None}).cost(rows, 4.0) is None


def test_a_time_is_that_of_a_target_and_a_rank() -> None:
    rows = planned(nn.Linear(32, 32), torch.randn(2, 32))
    targets = [
        SiteTimes(cache=None),
        SiteTimes(element="float16", cache=None),
        SiteTimes(("A", {"b": "c"}), cache=None),
    ]
    keys = [times._key(rows, rank) for times in targets for rank in (1, 2)]
    keys.append(targets[0]._key(planned(nn.Linear(32, 32), torch.randn(3, 32)), 1))
    assert len(set(keys)) == len(keys)
    assert SiteTimes(cache=None)._key(rows, 1) == keys[0]


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    SiteTimes(cache=tmp_path / "file" / "times.json").save()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_cannot_be_measured() -> None:
    with pytest.raises(dr.CalibrationError, match="times are measured in float32 or float16, not in 'int8': give one"):
        SiteTimes(element="int8", cache=None)
    with pytest.raises(dr.CalibrationError, match="0 repeats measure nothing: give a whole number of 1 or more"):
        SiteTimes(repeats=0, cache=None)
