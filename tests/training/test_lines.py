"""Lines say what the records do, and stay small."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

import dynrank_fx as dr
from dynrank_fx.schedules import EpochRecord
from dynrank_fx.text import rounded
from dynrank_fx.training.lines import lines_of, records_in

FULL, LOW = dr.Phase.FULL, dr.Phase.LOW
SITES = [f"decoder.layers.{index}.out_proj.weight" for index in range(96)]


def record(epoch: int, sites: list[str] = SITES, **more: Any) -> EpochRecord:
    """One as a training makes it, at a switch."""
    some = {site: rounded(12.3456 + epoch / 7 + index / 3, 5) for index, site in enumerate(sites)}
    made = EpochRecord(
        epoch=epoch,
        phases=dict.fromkeys(sites, LOW if epoch % 2 else FULL),
        ranks=dict.fromkeys(sites, 16),
        lr=0.1,
        reasons=("it is time",),
        epochs_to_cut={sites[0]: 1},
        switch_error=dict.fromkeys(sites[epoch % 2 :], 0.123456),
        switch_spectra={sites[0]: ((2.0, 1.0), (2.0, 0.0))},
        spent=float(epoch),
    )
    return made.with_figures(**{"effective_rank": some, "stable_rank": some, "loss": 1.0, "metric": None, **more})


def told(records: list[EpochRecord]) -> list[Any]:
    """What the lines have to say, in JSON's own values."""
    return json.loads(json.dumps([{**each.to_json(), "switch_spectra": {}} for each in records]))


def back(records: list[EpochRecord], start: int = 0) -> list[Any]:
    """Through the text of a file, which was grown from ``start`` on."""
    lines = [*lines_of(records[:start], 0), *lines_of(records, start)]
    read = records_in([json.loads(json.dumps(line, allow_nan=False)) for line in lines])
    return [EpochRecord.from_json(each).to_json() for each in read]


@pytest.mark.parametrize("start", range(6))
def test_what_is_written_is_read_wherever_the_file_was_continued(start: int) -> None:
    records = [record(epoch) for epoch in range(5)]
    assert back(records, start) == told(records)


def test_what_a_record_lacks_and_what_the_user_noted_come_through() -> None:
    nan = dict.fromkeys(SITES, math.nan)
    mine = {"by_site": "same", "phases_of_mine": {"0": 1}, "ranks": {}}
    other = EpochRecord(epoch=1, phases={"elsewhere": FULL}, lr=0.1, spent=1.0)
    records = [
        record(0, effective_rank={}, stable_rank=nan),
        record(1, stable_rank={SITES[3]: math.nan}, effective_rank=nan, **mine),
        other,
        record(3, phases=dict(reversed(record(3).phases.items()))),
    ]
    assert back(records) == told(records)
    numbers = [record(epoch, ["1", "0"]) for epoch in range(3)]
    assert back(numbers) == told(numbers), "sites whose names are numbers, in an order of their own"


def test_lines_of_earlier_versions_each_say_all_of_it() -> None:
    records = [record(epoch) for epoch in range(4)]
    old = [each.to_json() for each in records]
    assert records_in(old) == old
    went_on = [*old, *lines_of([*records, record(4)], 4)]
    assert [EpochRecord.from_json(each).epoch for each in records_in(went_on)] == [0, 1, 2, 3, 4]
    assert EpochRecord.from_json(records_in(went_on)[4]).phases == record(4).phases


def test_2000_records_of_96_sites_take_a_few_megabytes() -> None:
    records = [record(epoch) for epoch in range(40)]
    size = sum(len(json.dumps(line)) for line in lines_of(records, 0))
    assert size * 2000 / 40 < 10e6
    assert sum(len(json.dumps(each.to_json())) for each in records) > 5 * size
    still = [record(0).with_figures(epoch=epoch) for epoch in range(40)]
    assert sum(len(json.dumps(line)) for line in lines_of(still, 0)) < size / 3
