"""What a caller's own function raises is one sentence of ours, with the line that it came from."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import dynrank_fx as dr
from dynrank_fx.errors import telling


def fails(*_: object) -> object:
    return {}["gone"]


class Failing:
    """A rank policy and a schedule."""

    ranks = staticmethod(fails)

    def __repr__(self) -> str:
        return "Failing()"

    def __call__(self, state: dr.TrainState) -> dr.Phase:
        fails()
        return dr.Phase.LOW


def a_net() -> nn.Module:
    return dr.transform(nn.Sequential(nn.Linear(8, 8)), (torch.ones(2, 8),), rank=dr.Fixed(2))


def begun(schedule: Callable[[dr.TrainState], dr.Phase]) -> None:
    net = a_net()
    dr.Phases(net, torch.optim.SGD(net.parameters(), lr=0.1), schedule, epochs=3, steps=4, landing=True).begin(0)


def late(state: dr.TrainState) -> dr.Phase:
    return dr.Phase.FULL if state.epoch == 0 else Failing()(state)


LINE = fails.__code__.co_firstlineno + 1
RAISED = f"raised KeyError: 'gone' (test_errors.py, line {LINE}): mend it"


@pytest.mark.parametrize(
    ("call", "kind", "what"),
    [
        (lambda: begun(Failing()), dr.ScheduleError, "the schedule Failing(), asked of epoch 0,"),
        (lambda: begun(late), dr.ScheduleError, f"the schedule {late!r}, asked of epoch 1,"),
        (lambda: dr.reranked(a_net(), Failing()), dr.PlanError, "the rank policy Failing()"),
        (
            lambda: dr.compress(nn.Sequential(nn.Linear(8, 8)), (torch.ones(2, 8),), dr.Fixed(2), metric=fails),
            dr.PlanError,
            "the metric",
        ),
    ],
    ids=["schedule", "schedule asked ahead", "rank policy", "metric"],
)
def test_what_a_callers_function_raises(call: Callable[[], object], kind: type[Exception], what: str) -> None:
    with pytest.raises(kind) as caught:
        call()
    assert str(caught.value) == f"{what} {RAISED}"
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_sentence_of_ours_stays_as_it_is() -> None:
    with pytest.raises(dr.PlanError, match=r"^said before$"), telling("the metric", dr.ScheduleError):
        raise dr.PlanError("said before")


def test_an_error_without_lines_of_the_callers() -> None:
    with pytest.raises(dr.PlanError, match=r"^the metric raised TypeError: "), telling("the metric", dr.PlanError):
        len(3)  # type: ignore[arg-type]
