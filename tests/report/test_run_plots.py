"""The pictures of a run's page draw what the records say: read back from the figures themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

import dynrank_fx as dr
from dynrank_fx.report.run_plots import losses, rank_curves, rank_map, switch_spectra
from dynrank_fx.schedules import EpochRecord

FULL, LOW, ADAPTOR = dr.Phase.FULL, dr.Phase.LOW, dr.Phase.ADAPTOR


def record(epoch: int, phases: str, ranks: tuple[float, ...], **more: Any) -> EpochRecord:
    names = [f"{i}.weight" for i in range(len(phases))]
    letters = {"F": FULL, "L": LOW, "A": ADAPTOR}
    return EpochRecord(
        epoch=epoch,
        phases={name: letters[letter] for name, letter in zip(names, phases, strict=True)},
        lr=0.1,
        spent=0.8 * (epoch + 1),
        effective_rank=dict(zip(names, ranks, strict=True)),
        **{"loss": 1.0 / (epoch + 1)} | more,
    )


HISTORY = [record(0, "FL", (6.0, 3.0)), record(1, "FF", (5.0, 4.0)), record(2, "LA", (2.0, 4.5))]


def lines(figure: Figure, axes: int = 0) -> dict[str, tuple[list[float], list[float]]]:
    return {
        str(line.get_label()): (list(line.get_xdata()), list(line.get_ydata()))
        for line in figure.axes[axes].get_lines()
    }


def test_the_map_is_of_ranks_over_the_largest_with_a_dot_in_every_full_epoch() -> None:
    figure = rank_map(HISTORY, {"0.weight": 8, "1.weight": 5})
    (image,) = figure.axes[0].get_images()
    assert np.asarray(image.get_array()).tolist() == [[6 / 8, 5 / 8, 2 / 8], [3 / 5, 4 / 5, 4.5 / 5]]
    dots = {(x, y) for line in figure.axes[0].get_lines() for x, y in zip(*line.get_data(), strict=True)}
    assert dots == {(0, 0), (1, 0), (1, 1)}, "column and row"
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["0", "1"]
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["1", "2", "3"]


@pytest.mark.parametrize("sites", [2, 17])
def test_the_curves_are_every_sites_and_their_mean_and_only_few_are_named(sites: int) -> None:
    history = [record(e, "F" * sites, tuple(1.0 + i + e for i in range(sites))) for e in range(3)]
    drawn = rank_curves(history).axes[0].get_lines()
    assert len(drawn) == sites + 1
    for index, line in enumerate(drawn[:-1]):
        assert list(line.get_ydata()) == [1.0 + index + e for e in range(3)]
    assert list(drawn[-1].get_ydata()) == pytest.approx([(sites - 1) / 2 + 1 + e for e in range(3)])
    named = [line.get_label() for line in drawn if not str(line.get_label()).startswith("_")]
    assert named == (["0", "1", "mean"] if sites == 2 else ["mean"])


def test_the_spectra_are_those_of_the_last_cut_of_each_site_over_the_largest_value() -> None:
    first, last = ((4.0, 2.0, 1.0), (4.0, 2.0, 0.0)), ((8.0, 4.0, 1.0), (8.0, 4.0, 0.0))
    history = [
        record(0, "FF", (1.0, 1.0)),
        record(1, "LF", (1.0, 1.0), switch_spectra={"0.weight": first}),
        record(2, "FF", (1.0, 1.0), switch_spectra={"0.weight": (last[1], last[1])}),
        record(3, "LA", (1.0, 1.0), switch_spectra={"0.weight": last, "1.weight": first}),
    ]
    figure = switch_spectra(history)
    assert figure is not None
    (axes,) = [each for each in figure.axes if each.get_visible()]
    assert axes.get_title() == "0, epoch 4", "inflating is no cut, and an ADAPTOR none either"
    assert lines(figure) == {
        "before": ([1 / 3, 2 / 3, 1.0], [1.0, 0.5, 0.125]),
        "after": ([1 / 3, 2 / 3, 1.0], [1.0, 0.5, 1e-4]),
    }
    assert switch_spectra(history[:1]) is None
    assert switch_spectra(history[2:3]) is None


def test_losses_are_drawn_over_epochs_and_over_compute() -> None:
    history = [record(e, "F", (1.0,), eval_loss=2.0 / (e + 1), metric=0.1, eval_metric=0.2 * e) for e in range(3)]
    figure = losses(history, "accuracy")
    for axes, at in ((0, [1, 2, 3]), (1, [0.8, 1.6, pytest.approx(2.4)])):
        assert lines(figure, axes) == {"training": (at, [1.0, 0.5, 1 / 3]), "held out": (at, [2.0, 1.0, 2 / 3])}
        ((_, percent),) = lines(figure, axes + 2).values()
        assert percent == pytest.approx([0, 20, 40]), "held out, in percent"
    assert figure.axes[2].get_ylabel() == "accuracy, %"


def test_where_time_was_measured_they_are_drawn_over_it_too() -> None:
    history = [record(e, "F", (1.0,), metric=0.25, spent_time=None if e == 0 else 0.7 * (e + 1)) for e in range(3)]
    figure = losses(history, "accuracy")
    assert [axes.get_xlabel() for axes in figure.axes[3:]] == [
        "epoch",
        "compute, in epochs of dense training",
        "time, in epochs of dense training",
    ]
    for axes in (2, 5):
        ((at, _),) = lines(figure, axes).values()
        assert at == pytest.approx([np.nan, 1.4, 2.1], nan_ok=True), "an epoch before the measurement is a gap"


def test_without_held_out_data_the_training_metric_is_drawn_and_without_any_none() -> None:
    only_training = losses([record(e, "F", (1.0,), metric=0.25) for e in range(2)], "accuracy")
    assert lines(only_training).keys() == {"training"}
    ((_, percent),) = lines(only_training, 2).values()
    assert percent == [25, 25]
    assert lines(losses(HISTORY, "accuracy"), 2) == {}


def test_an_epoch_without_a_figure_is_a_gap() -> None:
    history = [record(e, "F", (1.0,), loss=None if e == 1 else 1.0) for e in range(3)]
    ((_, loss),) = lines(losses(history, "accuracy")).values()
    assert np.isnan(loss).tolist() == [False, True, False]
