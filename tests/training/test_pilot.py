"""Short runs of equal compute: each takes what it says, and the best small one is named."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

import dynrank_fx as dr
from dynrank_fx.training import Pilot, Settings, Task, Trial, pilot


def _model(width: int = 32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))


def _task() -> Task:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 8, 16, generator=generator)
    batches = [(each, (each[:, :4].sum(1) > 0).long()) for each in x]
    loss = lambda output, batch: nn.functional.cross_entropy(output, batch[1])  # noqa: E731
    metric = lambda output, batch: (output.argmax(1) == batch[1]).float().mean()  # noqa: E731
    return Task(batches[:30], loss, lambda batch: ((batch[0],), {}), batches[30:], metric)


def _net(model: nn.Module, **options: object) -> nn.Module:
    return dr.transform(model, (torch.zeros(2, 16),), **options)


def _found(**options: object) -> Pilot:
    settings = Settings(steps=60, compile=False)
    net = _net(_model(), rank=dr.Ratio(0.25), leave=())
    return pilot(net, _task(), partial(torch.optim.AdamW, lr=1e-2), settings, **options)


def test_every_way_takes_the_compute_of_the_dense_steps_and_says_what_it_leaves() -> None:
    begun: list[tuple[str, int]] = []
    narrow = _net(_model(16), rank=dr.Ratio(0.25), leave=())
    found = _found(narrower=narrow, begun=lambda *each: begun.append(each))
    ways = ["dense, as it is", "LOW alone", "auto, 12% FULL", "auto, 40% FULL", "narrower dense"]
    assert [(each.way, each.steps) for each in found.trials] == begun
    assert [each.way for each in found.trials] == ways
    assert all(each.compute == pytest.approx(60, rel=0.06) for each in found.trials)
    dense, low, early, later, narrower = found.trials
    assert dense.steps == 60
    assert low.steps > early.steps > later.steps > 60
    plan = dr.plan_of(_net(_model(), rank=dr.Ratio(0.25), leave=()))
    assert plan.low_flops is not None
    assert plan.total_flops
    sizes = [low.size, early.size, later.size]
    assert sizes == pytest.approx([plan.low_flops / plan.total_flops] * 3)
    assert narrower.size == pytest.approx((16 * 16 * 2 + 16 * 2) / (16 * 32 + 32 * 32 + 32 * 2))
    assert all(0 < each.loss < 0.6 for each in found.trials), "it learns, where chance is 0.69"
    assert all(each.metric is not None and each.metric > 0.7 for each in found.trials)


def test_the_net_stays_as_it_was_and_the_same_seed_gives_the_same() -> None:
    first, again = _found(seed=3), _found(seed=3)
    assert [each.loss for each in first.trials] == [each.loss for each in again.trials]


def test_the_best_is_the_factored_one_where_a_narrower_one_is_level() -> None:
    def trial(way: str, loss: float, size: float, *options: str) -> Trial:
        return Trial(way, options, 60, 60.0, size, loss, None, 1.0)

    dense, low = trial("dense", 0.5, 1.0), trial("LOW", 1.002, 0.4, "--schedule", "low")
    assert Pilot((dense, low, trial("narrower", 1.0, 0.4))).best is low
    below = trial("LOW", -1.002, 0.4, "--schedule", "low")
    assert Pilot((dense, below, trial("narrower", -1.0, 0.4))).best is below
    assert Pilot((dense, trial("LOW", -0.9, 0.4, "-"), trial("narrower", -1.0, 0.4))).best.way == "narrower"
    narrow = trial("narrower", 0.9, 0.4)
    assert Pilot((dense, low, narrow)).best is narrow


def test_what_saves_parameters_alone_is_among_the_small_ones() -> None:
    """Factors of an embedding leave its FLOPs as they are, which are none."""
    dense, low = (Trial(way, (), 60, 60.0, 1.0, loss, None, 1.0) for way, loss in (("dense", 0.5), ("LOW", 0.6)))
    assert Pilot((dense, low)).best is low


def test_too_few_steps_are_refused() -> None:
    net = _net(_model(), rank=dr.Ratio(0.25), leave=())
    with pytest.raises(dr.DynrankError, match="a pilot of 5 steps says nothing"):
        pilot(net, _task(), torch.optim.AdamW, Settings(steps=5))
