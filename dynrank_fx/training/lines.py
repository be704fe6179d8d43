"""Records as the lines of a file, small however many sites a net has.

What a record says of every site would be most of it: the names, several times over. The first line has them; in those
after it, under ``by site``, the values stand in that order, and ``same`` stands for those of the line before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..aliases import JsonObject
from ..schedules import EpochRecord

_BY_SITE = ("phases", "ranks", "epochs_to_cut", "switch_error", "effective_rank", "stable_rank")
_PACKED, _SAME = "by site", "same"  # with a space, which no figure of the user's has


def lines_of(records: Sequence[EpochRecord], start: int) -> list[JsonObject]:
    """The lines of the records from ``start`` on; spectra are none of theirs."""
    if start == len(records):
        return []
    sites = list(records[0].phases)
    before, lines = _plain(records[start - 1]) if start else {}, []
    for index, record in enumerate(records[start:], start):
        now = _plain(record)
        lines.append(_packed(now, before, sites) if index else now)
        before = now
    return lines


def records_in(lines: Sequence[JsonObject]) -> list[JsonObject]:
    """The records, as ``EpochRecord.to_json`` has them, that these lines say; those of earlier versions too, each of
    which says all of it.
    """
    records: list[JsonObject] = []
    for line in lines:
        packed = line.get(_PACKED)
        if packed is None:
            records.append(line)
        else:
            known = {name: values for name, values in line.items() if name != _PACKED}
            records.append(known | _unpacked(packed, records[-1], list(records[0]["phases"])))
    return records


def _plain(record: EpochRecord) -> JsonObject:
    return {name: value for name, value in record.to_json().items() if name != "switch_spectra"}


def _packed(record: JsonObject, before: JsonObject, sites: Sequence[str]) -> JsonObject:
    found = {name: record[name] for name in _BY_SITE if record.get(name) and record[name].keys() <= set(sites)}
    packed = {name: _SAME if by == before.get(name) else _in_order(by, sites) for name, by in found.items()}
    return {name: value for name, value in record.items() if name not in packed} | {_PACKED: packed}


def _in_order(by: Mapping[str, object], sites: Sequence[str]) -> list[object] | dict[str, object]:
    """The values of all sites; of a few by the number of each."""
    if len(by) == len(sites):
        return [by[site] for site in sites]
    return {str(number): by[site] for number, site in enumerate(sites) if site in by}


def _unpacked(packed: JsonObject, before: JsonObject, sites: Sequence[str]) -> JsonObject:
    values: JsonObject = {}
    for name, each in packed.items():
        if each == _SAME:
            values[name] = before[name]
        elif isinstance(each, list):
            values[name] = dict(zip(sites, each, strict=True))
        else:
            values[name] = {sites[int(number)]: value for number, value in each.items()}
    return values
