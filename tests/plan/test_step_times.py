"""Times of training steps of single sites: of what the net would compute, kept by all that they depend on."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import dynrank_fx as dr
from dynrank_fx.plan import PlannedSite


class Layers(nn.Module):
    """A table, a weight of two uses, a convolution, and two that read the same input."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.twice = nn.Embedding(50, 24), nn.Linear(24, 24)
        self.conv = nn.Conv1d(24, 32, 3, padding=1)
        self.q, self.k = nn.Linear(32, 20), nn.Linear(32, 28)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(self.table(x)).relu())
        x = self.conv(x.mT).mT
        return self.q(x).sum(-1) * self.k(x).sum(-1)


def groups(share: bool = False) -> list[list[PlannedSite]]:
    x = torch.zeros(3, 5, dtype=torch.long)
    net = dr.transform(Layers(), (x,), rank=dr.Fixed(4), allow_unprofitable=True, share_inputs=share)
    rows = {row.site.name: row for row in dr.plan_of(net).sites}
    names = dict.fromkeys(row.sharing or (name,) for name, row in rows.items())
    return [[rows[name] for name in group] for group in names]


@pytest.mark.parametrize("share", [False, True])
def test_what_is_timed_has_the_flops_of_the_plan_forward_and_twice_back(share):
    """Counted by torch. A product of a table's rows has one gradient, as row numbers have none."""
    times = dr.StepTimes(cache=None)
    for rows in groups(share):
        table = rows[0].site.kind == "embedding"
        for factored in (False, True):
            step = times._step(rows, factored)
            with FlopCounterMode(display=False) as counter:
                step()
            sides = [row.flops if factored else row.site.flops for row in rows]
            assert counter.get_total_flops() == 3 * sum(side or 0 for side in sides), (rows[0].site.name, table)


def test_every_site_is_timed_and_the_cache_keeps_its_times(tmp_path: Path) -> None:
    cache = tmp_path / "times.json"
    times = dr.StepTimes(cache=cache, repeats=1)
    pairs = [times.pair(rows) for rows in groups()]
    assert all(pair is not None and pair.first > 0 and pair.second > 0 for pair in pairs)
    times.save()
    again = dr.StepTimes(cache=cache)
    again._measured = None  # type: ignore[method-assign,assignment]
    assert [again.pair(rows) for rows in groups()] == pairs


def test_times_of_another_type_rank_or_machine_are_others(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = groups()[1]
    times = dr.StepTimes(cache=None)
    other = [
        dr.StepTimes(cache=None, amp=torch.bfloat16),
        dr.StepTimes(cache=None, dtype=torch.float64),
        dr.StepTimes(cache=None, compile=True),
    ]
    keys = {each._key(rows) for each in (times, *other)}
    keys.add(times._key(groups()[2]))
    monkeypatch.setattr("platform.node", lambda: "elsewhere")
    keys.add(times._key(rows))
    assert len(keys) == 6


def test_it_runs_as_the_net_does_in_autocast_and_compiled() -> None:
    rows = groups()[1]
    for times in (dr.StepTimes(cache=None, amp=torch.bfloat16, repeats=1), dr.StepTimes(cache=None, repeats=1)):
        assert times.pair(rows) is not None
    assert str(dr.StepTimes(cache=None, amp=torch.bfloat16)).endswith(", bfloat16, eager")


@pytest.mark.parametrize("share", [False, pytest.param(True, marks=pytest.mark.fuzz)])
def test_torch_compile_takes_what_is_timed_as_one_graph(share: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And more of them than it compiles one function for. Its front is what could refuse; the kernels behind it would
    take seconds for each shape.
    """
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    times = dr.StepTimes(cache=None, compile=True, repeats=1)
    eager = dr.StepTimes(cache=None)
    for rows in groups(share):
        for factored in (False, True):
            given, wanted = times._step(rows, factored)(), eager._step(rows, factored)()
            torch.testing.assert_close(given, wanted)


def test_what_has_no_shapes_is_not_timed() -> None:
    traced = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(30, 40)))
    net = dr.transform(traced, rank=dr.Fixed(3))
    assert dr.StepTimes(cache=None).pair(dr.plan_of(net).sites) is None


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"amp": torch.float32}, "amp is torch.float32: give"),
        ({"dtype": torch.int8}, "weights of dtype torch.int8 do not train"),
        ({"device": "nowhere"}, "nothing can be timed on the device 'nowhere'"),
        ({"repeats": 0}, "0 repeats measure nothing"),
    ],
)
def test_a_place_that_cannot_be_is_refused(said, why):
    with pytest.raises(dr.PlanError, match=why):
        dr.StepTimes(cache=None, **said)
