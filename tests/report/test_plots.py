"""Pictures of runs and spectra of every size, drawn without a warning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dynrank_fx.errors import DynrankError, StoreError
from dynrank_fx.phase import Phase
from dynrank_fx.report import plot_run, plot_spectra
from dynrank_fx.report.matrices import MatrixRow
from dynrank_fx.report.plots import label_of
from dynrank_fx.schedules import EpochRecord


def spectra(count: int, *values: float) -> list[MatrixRow]:
    return [MatrixRow(f"layers.{i}.query.weight", (3, 3), "dense", values, 2.0, 1.5, 2) for i in range(count)]


def history(epochs: int, sites: int, **more: Any) -> list[EpochRecord]:
    names = [f"layers.{i}.query.weight" for i in range(sites)]
    return [
        EpochRecord(
            epoch=epoch,
            phases={name: (Phase.LOW, Phase.FULL)[(i + epoch) % 2] for i, name in enumerate(names)},
            lr=0.1,
            spent=epoch + 1.0,
            loss=1 / (epoch + 1),
            effective_rank=dict.fromkeys(names, 2.0 + epoch),
            **more,
        )
        for epoch in range(epochs)
    ]


def height(path: Path) -> int:
    """Of a PNG, as its header has it."""
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    return int.from_bytes(data[20:24], "big")


@pytest.mark.parametrize("count", [1, 120])
def test_spectra_of_few_and_of_many_matrices(count: int, tmp_path: Path) -> None:
    plot_spectra(spectra(count, 2.0, 1.0, 0.0), tmp_path / "p.png")
    assert height(tmp_path / "p.png") > 10 * count


def test_the_spectrum_of_zeros(tmp_path: Path) -> None:
    plot_spectra(spectra(1, 0.0, 0.0), tmp_path / "p.png")
    assert height(tmp_path / "p.png") > 0


@pytest.mark.parametrize("epochs", [1, 12])
@pytest.mark.parametrize("sites", [0, 1, 60])
@pytest.mark.parametrize("metric", [{}, {"eval_metric": 0.5}], ids=["no metric", "metric"])
def test_runs_of_few_and_of_many_sites_and_epochs(epochs: int, sites: int, metric: Any, tmp_path: Path) -> None:
    plot_run(history(epochs, sites, **metric), tmp_path / "p.png")
    assert height(tmp_path / "p.png") > 10 * sites


def test_the_picture_says_what_it_shows(tmp_path: Path) -> None:
    plot_run(history(3, 2, eval_metric=0.9), tmp_path / "run.svg")
    text = (tmp_path / "run.svg").read_text()
    for part in (
        "Effective rank of each site",
        "layers.0.query",
        "LOW epochs",
        "FULL epochs",
        "training loss",
        "epoch",
    ):
        assert text.count(f"<!-- {part} -->") == 1
    plot_spectra(spectra(2, 2.0, 1.0), tmp_path / "spectra.svg")
    assert "<!-- layers.1.query (2 of 2) -->" in (tmp_path / "spectra.svg").read_text()


def test_a_long_name_leaves_room_and_an_escape_is_spelt_out() -> None:
    assert label_of("layers.0.query.weight") == "layers.0.query"
    assert label_of("a" * 100 + "b" * 200 + ".weight") == "a" * 30 + "…" + "b" * 30
    assert label_of("\x1b[31mred.weight") == "\\x1b[31mred"


@pytest.mark.parametrize(("epochs", "label"), [(300, "epoch"), (1400, "epoch (300 of 1,400 are shown, evenly spread)")])
def test_a_picture_of_a_long_run_says_that_it_is_thinned(epochs: int, label: str, tmp_path: Path) -> None:
    plot_run(history(epochs, 2), tmp_path / "run.svg")
    assert f"<!-- {label} -->" in (tmp_path / "run.svg").read_text()


def test_what_cannot_be_drawn_is_told(tmp_path: Path) -> None:
    with pytest.raises(DynrankError, match=r"^there is no matrix whose spectrum could be drawn$"):
        plot_spectra([], tmp_path / "p.png")
    with pytest.raises(
        DynrankError, match=r"^a picture cannot be written as '\.txt': give a name that ends in \.png, "
    ):
        plot_spectra(spectra(1, 1.0), tmp_path / "p.txt")
    with pytest.raises(StoreError, match="No such file or directory"):
        plot_spectra(spectra(1, 1.0), tmp_path / "no" / "p.png")
    assert list(tmp_path.iterdir()) == []
