"""Measurements against a clock that a test sets: who is timed when, and what is made of the times."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from dynrank_fx import timing
from dynrank_fx.timing import interleaved, machine, threads_said


class Clock:
    """Stands still but for the calls, which take so long as they say."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.log: list[str] = []
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def call(self, name: str, seconds: Callable[[int], float]) -> Callable[[], None]:
        def run() -> None:
            self.now += seconds(self.log.count(name))
            self.log.append(name)

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_both_run_in_turn_and_the_order_alternates(clock: Clock) -> None:
    pair = interleaved(clock.call("a", lambda _: 2.0), clock.call("b", lambda _: 3.0), repeats=4, warmup=1)
    assert "".join(clock.log) == "ab" + "ba" + "ab" + "ba" + "ab"
    assert (pair.first, pair.second, pair.ratio) == (2.0, 3.0, 1.5)


def test_the_ratio_is_the_median_of_neighbours_so_that_a_slow_moment_hits_both(clock: Clock) -> None:
    """The machine becomes three times slower after a third of the time; the ratio stays."""
    slow = [1.0] * 3 + [3.0] * 6
    pair = interleaved(clock.call("a", lambda i: slow[i]), clock.call("b", lambda i: 2 * slow[i]), repeats=9, warmup=0)
    assert pair.ratio == 2.0
    assert pair.first == 3.0


def test_the_mean_of_several_calls_is_one_measurement(clock: Clock) -> None:
    pair = interleaved(
        clock.call("a", lambda i: 1.0 + i % 2), clock.call("b", lambda _: 1.0), repeats=3, warmup=0, inner=4
    )
    assert pair.first == 1.5
    assert clock.log.count("a") == 12


def test_warming_up_is_not_measured(clock: Clock) -> None:
    pair = interleaved(clock.call("a", lambda i: 100.0 if i < 2 else 1.0), clock.call("b", lambda _: 1.0), warmup=2)
    assert pair.first == 1.0


def test_the_machine_is_told_in_one_line() -> None:
    import torch

    assert (threads_said(1), threads_said(4)) == ("1 thread", "4 threads")
    assert f"; {threads_said(torch.get_num_threads())}; torch {torch.__version__}; Python 3." in machine()
    assert "\n" not in machine()
