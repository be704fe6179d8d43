"""What is kept of the ticks of a run: the spectra of a cut, learning rates, and the records in a state."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..aliases import JsonObject, StateDict
from ..checks import is_number, is_whole
from ..errors import StoreError
from ..schedules import EpochRecord, Spectra
from ..text import rounded

NO_STATE = "the state holds no history of phases: give what Phases.state_dict() gave"
_POINTS = 64  # of a spectrum in a record
_KEPT = 1_000_000  # letters of the records in a state, as JSON


def thinned(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, Spectra]:
    """Per site both spectra at the same up to 64 indices, evenly spread from first to last; zeros where the smaller one
    has ended.
    """
    spectra = {}
    for name in before:
        count = max(len(before[name]), len(after[name]))
        step = max(1.0, (count - 1) / (_POINTS - 1))
        chosen = [round(i * step) for i in range(min(count, _POINTS))]
        spectra[name] = (_at(before[name], chosen, count), _at(after[name], chosen, count))
    return spectra


def _at(spectrum: Tensor, chosen: list[int], count: int) -> tuple[float, ...]:
    """A spectrum, with zeros up to ``count`` values, at these indices, in four digits."""
    padded = torch.nn.functional.pad(spectrum, (0, count - len(spectrum)))
    return tuple(rounded(value, 4) for value in padded[chosen].tolist())


def rates_so_far(earlier: Sequence[float], history: Sequence[EpochRecord], tick: int) -> list[float]:
    """The learning rates of the ticks before this one; of one that never began, where an epoch was shorter than was
    said, that of the tick before it. earlier: those of the ticks before the first of the history.
    """
    rates = [*earlier]
    for record in history:
        rates += rates[-1:] * (record.epoch - len(rates)) + [record.lr]
    return rates + rates[-1:] * (tick - len(rates))


def last_of(history: Sequence[EpochRecord]) -> list[JsonObject]:
    """The last records, for a state."""
    kept, size = list[JsonObject](), 0
    for record in reversed(history):
        said = record.to_json()
        size += len(json.dumps(said, default=str))
        if kept and size > _KEPT:
            break
        kept.append(said)
    return kept[::-1]


def history_in(state: StateDict) -> tuple[list[float], list[EpochRecord]]:
    """The records in what ``Phases.state_dict`` gave, and the learning rates before them. Raises StoreError for what is
    of something else.
    """
    try:
        history = [EpochRecord.from_json(record) for record in state["history"]]
        earlier = [*state.get("rates", ())]
        sound = all(map(_is_record, history)) and all(map(is_number, earlier))
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise StoreError(NO_STATE) from error
    if not sound or (earlier and (not history or history[0].epoch != len(earlier))):
        raise StoreError(NO_STATE)
    return earlier, history


def _is_record(record: EpochRecord) -> bool:
    """Whether what training goes on from is there."""
    whole = is_whole(record.epoch) and all(is_whole(rank, 1) for rank in record.ranks.values())
    return whole and is_number(record.lr) and is_number(record.spent, 0)
