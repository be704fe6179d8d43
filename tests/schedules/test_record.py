"""A record of an epoch: typed in Python, and in a file the object that every version has written."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, replace

import pytest

import dynrank_fx as dr
from dynrank_fx.schedules import EpochRecord

FULL, LOW, ADAPTOR = dr.Phase.FULL, dr.Phase.LOW, dr.Phase.ADAPTOR

# As checkpoints and histories have them, those too that were written when records were dicts.
BEGUN = {
    "epoch": 2,
    "phase": "1 FULL 1 LOW",
    "phases": {"0.weight": "FULL", "4.weight": "LOW"},
    "ranks": {"0.weight": 4, "4.weight": 8},
    "lr": 0.05,
    "reasons": ["cut 4.weight: beyond rank 8 is 0.0% of its energy"],
    "epochs_to_cut": {"0.weight": 1},
    "switch_error": {"4.weight": 1e-6},
    "switch_spectra": {"4.weight": [[3.0, 2.0, 1e-9], [3.0, 2.0, 0.0]]},
    "switch_seconds": 0.02,
    "spent": 2.7,
}
UNDER_WAY = BEGUN | {"seconds": 0.0}
FINISHED = BEGUN | {
    "seconds": 1.5,
    "step_seconds": 0.01,
    "steps": 3,
    "loss": 1.25,
    "metric": 0.5,
    "eval_loss": 1.5,
    "eval_metric": 0.25,
    "memory": {"state": 100, "peak": 1000},
    "effective_rank": {"0.weight": 3.5, "4.weight": 2.5},
    "stable_rank": {"0.weight": 2.0, "4.weight": 1.5},
}
LAST = FINISHED | {"truncated": {"eval_loss": 1.5, "eval_metric": None}}
BARE = {
    key: value
    for key, value in FINISHED.items()
    if key not in ("eval_loss", "eval_metric", "effective_rank", "stable_rank")
} | {"metric": None}
NO_METRIC = FINISHED | {"metric": None, "eval_metric": None, "step_seconds": None}
WRITTEN = {
    "begun": BEGUN,
    "under way": UNDER_WAY,
    "finished": FINISHED,
    "the last of a run": LAST,
    "without evaluation, metric and spectra": BARE,
    "without a metric": NO_METRIC,
    "with a figure of a loop of one's own": FINISHED | {"gradient_norm": 2.0, "notes": ["warm"]},
}


@pytest.mark.parametrize("data", WRITTEN.values(), ids=WRITTEN)
def test_what_is_in_a_file_comes_back_key_by_key(data: dict[str, object]) -> None:
    record = EpochRecord.from_json(data)
    assert json.dumps(record.to_json()) == json.dumps(data), "values, keys and their order"
    assert EpochRecord.from_json(json.loads(json.dumps(record.to_json()))) == record


def test_a_record_of_an_earlier_version_has_fewer_fields() -> None:
    old = {key: FINISHED[key] for key in ("epoch", "phase", "phases", "lr", "switch_error", "spent", "loss", "metric")}
    record = EpochRecord.from_json(old)
    assert (record.ranks, record.reasons, record.switch_spectra, record.memory) == ({}, (), {}, {})
    assert record.loss == 1.25


def test_fields_are_typed_and_are_read_as_attributes_or_by_name() -> None:
    record = EpochRecord.from_json(LAST)
    assert record.phases == {"0.weight": FULL, "4.weight": LOW}
    assert all(isinstance(phase, dr.Phase) for phase in record.phases.values())
    assert record.switch_spectra["4.weight"] == ((3.0, 2.0, 1e-9), (3.0, 2.0, 0.0))
    for name in LAST:
        assert record[name] == getattr(record, name)
    assert record.with_figures(mine=1)["mine"] == 1
    for name in ("mine", "more", "to_json", "__class__"):
        with pytest.raises(KeyError):
            record[name]


def test_figures_are_added_to_another_record_and_none_is_changed() -> None:
    begun = EpochRecord.from_json(BEGUN)
    noted = begun.with_figures(loss=0.5, gradient_norm=2.0)
    assert (begun.loss, begun.more) == (None, {})
    assert noted == replace(begun, loss=0.5, more={"gradient_norm": 2.0})
    assert noted.with_figures(other=1).more == {"gradient_norm": 2.0, "other": 1}
    with pytest.raises(FrozenInstanceError):
        begun.loss = 0.5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("phases", "label"),
    [([FULL], "FULL"), ([LOW, LOW], "LOW"), ([LOW, FULL, LOW], "1 FULL 2 LOW"), ([ADAPTOR, FULL], "1 FULL 1 ADAPTOR")],
)
def test_the_phase_of_all_sites_or_how_many_are_in_which(phases: list[dr.Phase], label: str) -> None:
    record = EpochRecord(epoch=0, phases=dict(enumerate(phases)), lr=0.1, spent=1.0)  # type: ignore[arg-type]
    assert record.phase == record["phase"] == label
