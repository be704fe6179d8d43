"""Schedules as literal lists of epochs; they are pure, frozen, comparable and printable."""

from __future__ import annotations

import dataclasses

import pytest

import dynrank_fx as dr
from dynrank_fx import schedules
from dynrank_fx.schedules import Schedule

F, L, A = dr.Phase.FULL, dr.Phase.LOW, dr.Phase.ADAPTOR


def phases(schedule: Schedule, epochs: int) -> list[object]:
    return [schedule(dr.TrainState(epoch, epochs)) for epoch in range(epochs)]


EXAMPLES = (
    pytest.param(schedules.always(F), [F, F, F], id="always full"),
    pytest.param(schedules.always(L), [L, L, L], id="always low"),
    pytest.param(schedules.interleave(low=2, full=1), [L, L, F, L, L, F, L], id="interleave"),
    pytest.param(schedules.interleave(low=0, full=2), [F, F, F], id="interleave without low"),
    pytest.param(schedules.interleave(low=1, full=0), [L, L, L], id="interleave without full"),
    pytest.param(schedules.aligned(10, [6]), [L, L, L, L, F, F, F, L, L, L], id="aligned"),
    pytest.param(schedules.aligned(10, [6], last=A), [L, L, L, L, F, F, F, A, A, A], id="aligned, then adaptors"),
    pytest.param(schedules.warm_up(2), [F, F, L, L], id="warm-up"),
    pytest.param(schedules.aligned(10, [9, 7]), [L, L, L, L, F, F, F, F, L, L], id="aligned with the first decay"),
    pytest.param(schedules.aligned(10, [9]), [L, L, L, L, F, F, F, F, F, F], id="aligned to the end"),
    pytest.param(
        schedules.join([schedules.always(F), schedules.interleave(low=2, full=1)], [2]),
        [F, F, L, L, F, L, L, F],
        id="join counts epochs from the part's own start",
    ),
    pytest.param(
        schedules.join([schedules.always(L), schedules.always(F), schedules.always(L)], [1, 3]),
        [L, F, F, L, L],
        id="join has absolute boundaries",
    ),
    pytest.param(schedules.join([schedules.always(F)], []), [F, F], id="join of one"),
    pytest.param(
        schedules.join(
            [schedules.join([schedules.always(F), schedules.always(L)], [1]), schedules.interleave(low=1, full=1)], [3]
        ),
        [F, L, L, L, F, L],
        id="join of joins",
    ),
)


@pytest.mark.parametrize(("schedule", "expected"), EXAMPLES)
def test_a_schedule_over_its_epochs(schedule, expected):
    assert phases(schedule, len(expected)) == expected


@pytest.mark.parametrize(("schedule", "expected"), EXAMPLES)
def test_a_schedule_is_pure_frozen_comparable_and_printable(schedule, expected):
    backwards = [schedule(dr.TrainState(epoch, len(expected))) for epoch in reversed(range(len(expected)))]
    assert backwards[::-1] == expected, "no answer depends on what was asked before"
    assert schedule == dataclasses.replace(schedule)
    assert hash(schedule) == hash(dataclasses.replace(schedule))
    namespace = {name: getattr(schedules, name) for name in ("Always", "Interleave", "FullBetween", "Join")}
    text = repr(schedule).replace("<Phase.FULL: 0>", "Phase.FULL").replace("<Phase.LOW: 1>", "Phase.LOW")
    text = text.replace("<Phase.ADAPTOR: 2>", "Phase.ADAPTOR")
    assert eval(text, namespace | {"Phase": dr.Phase}) == schedule
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(schedule, dataclasses.fields(schedule)[0].name, None)


def test_the_papers_own_epochs():
    """arXiv 2508.08625: LOW, FULL from I to D - 1, then a branch beside the frozen weight, or the truncated factors."""
    assert phases(schedules.paper_cifar10(), 150) == [L] * 55 + [F] * 65 + [A] * 30
    assert phases(schedules.paper_cifar10(last=L), 150) == [L] * 55 + [F] * 65 + [L] * 30
    assert phases(schedules.paper_cifar100(), 200) == [L] * 80 + [F] * 90 + [A] * 30


def test_aligned_is_the_papers_placement_in_general_form():
    """0.4·T and the first decay + 0.1·T lie within 0.04·T of the epochs the paper chose by hand."""
    assert phases(schedules.aligned(150, (100, 130)), 150) == [L] * 60 + [F] * 55 + [L] * 35
    assert schedules.aligned(200, (150, 180), last=A) == schedules.paper_cifar100()
    for ours, paper, epochs in (
        (schedules.aligned(150, (100, 130)), schedules.paper_cifar10(), 150),
        (schedules.aligned(200, (150, 180)), schedules.paper_cifar100(), 200),
    ):
        assert abs(ours.inflate - paper.inflate) <= 0.04 * epochs
        assert abs(ours.deflate - paper.deflate) <= 0.04 * epochs


def test_a_part_of_a_join_sees_its_own_length_and_all_else_unchanged():
    seen = []

    def watch(state: dr.TrainState) -> dr.Phase:
        seen.append(state)
        return F

    spectra = {"fc.weight": (2.0, 1.0)}
    joined = schedules.join([watch, watch, watch], [3, 5])
    for epoch in (2, 3, 5):
        joined(dr.TrainState(epoch, 9, lr=0.1, spectra=spectra, spent=1.5))
    assert [(s.epoch, s.epochs) for s in seen] == [(2, 3), (0, 2), (0, 4)]
    assert all((s.lr, s.spectra, s.spent) == (0.1, spectra, 1.5) for s in seen)
    joined(dr.TrainState(7))
    assert (seen[-1].epoch, seen[-1].epochs) == (2, None), "an open end stays open"


def test_a_schedule_may_give_a_phase_per_site():
    mixed = {"fc*": F, "conv*": L}
    assert phases(schedules.join([schedules.always(L), lambda state: mixed], [1]), 2) == [L, mixed]


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: schedules.interleave(low=0, full=0), "no epochs to alternate: give both as whole numbers, 0 or more"),
        (lambda: schedules.interleave(low=-1, full=2), "interleave\\(low=-1, full=2\\) has no epochs to alternate"),
        (lambda: schedules.aligned(100, []), "needs the epochs of the learning-rate decays"),
        (lambda: schedules.aligned(100, [20]), "leaves no FULL epoch.*epoch 30, before epoch 40"),
        (lambda: schedules.aligned(0, [20]), "a run cannot have 0 epochs: give a whole number of 1 or more"),
        (lambda: schedules.aligned("9", [2]), "a run cannot have '9' epochs"),
        (
            lambda: schedules.aligned(10, 5),
            "needs the epochs of the learning-rate decays, not 5; give at least one, such",
        ),
        (lambda: schedules.aligned(10, "57"), "needs the epochs of the learning-rate decays, not '57'"),
        (lambda: schedules.aligned(10, [5], "LOW"), "'LOW' is no phase; give one of FULL, LOW, ADAPTOR"),
        (lambda: schedules.paper_cifar10("LOW"), "'LOW' is no phase"),
        (lambda: schedules.interleave(low=2.5, full=1), r"interleave\(low=2.5, full=1\) has no epochs to alternate"),
        (lambda: schedules.interleave(low="2", full=1), r"interleave\(low='2', full=1\) has no epochs to alternate"),
        (lambda: schedules.warm_up(2.5), "FULL from epoch 0 to before epoch 2.5 is no FULL epoch"),
        (lambda: schedules.warm_up(True), "FULL from epoch 0 to before epoch True is no FULL epoch"),
        (lambda: schedules.join([schedules.always(F)] * 2, [2.5]), r"boundaries \(2.5,\)"),
        (lambda: schedules.join([schedules.always(F)] * 2, 3), "join needs its boundaries as a list, not 3"),
        (lambda: schedules.join([schedules.Always, F], [3]), r"Always'> is no schedule: give one such as"),
        (lambda: dr.TrainState(2.5), "there is no epoch 2.5: give a whole number, counted from 0"),
        (lambda: dr.TrainState(0, 0), "a run cannot have 0 epochs"),
        (lambda: schedules.join([], []), "a boundary between each two schedules, rising"),
        (lambda: schedules.join([schedules.always(F)], [3]), "it has 1 schedules and the boundaries \\(3,\\)"),
        (lambda: schedules.join([schedules.always(F)] * 3, [5, 5]), "boundaries \\(5, 5\\)"),
        (lambda: schedules.join([schedules.always(F)] * 3, [5, 2]), "boundaries \\(5, 2\\)"),
        (lambda: schedules.join([schedules.always(F)] * 2, [0]), "boundaries \\(0,\\)"),
        (lambda: schedules.join([schedules.always(F)] * 2, [-3]), "boundaries \\(-3,\\)"),
        (lambda: schedules.always(7), "7 is no phase"),
        (lambda: schedules.FullBetween(5, 5), "FULL from epoch 5 to before epoch 5 is no FULL epoch"),
    ],
)
def test_what_cannot_be_is_refused_in_words(make, sentence):
    with pytest.raises(dr.DynrankError, match=sentence):
        make()
