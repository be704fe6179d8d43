"""What an epoch of training was: the phases it was in, what its switch did, and what came of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeAlias

from ..aliases import Json, JsonObject
from ..phase import Phase, summary
from ..text import finite

Spectra: TypeAlias = tuple[tuple[float, ...], tuple[float, ...]]
"""Singular values before and after, largest first."""


@dataclass(frozen=True, kw_only=True)
class EpochRecord:
    """One epoch of a run, or one tick of a run that is counted in steps (see ``TrainState``).

    What is known at its start comes first; what comes of it is None or empty until then.

    A field is read as an attribute, or by its name as a key: ``record.loss``, ``record["loss"]``. In a file a record is
    a JSON object, see ``to_json``.

    Attributes:
        epoch: The epoch, counted from 0.
        phases: The phase of each site, by name.
        ranks: The rank of each site, by name.
        lr: The learning rate of the first parameter group at the start.
        reasons: Why these phases: sentences of the schedule.
        epochs_to_cut: How many epochs each dense site has before its cut, where a landing needs to know.
        switch_error: By how much the switch changed the weight of a site, relative to its norm; of the sites that
            switched.
        switch_spectra: The singular values before and after the switch at up to 64 indices; of the sites that were cut,
            and by a training only in the record of the last cut of each.
        switch_seconds: How long the switch took, in seconds.
        spent: Training compute to the end of the epoch, in epochs of the dense model, by FLOPs.
        seconds: How long the epoch has trained so far, in seconds.
        step_seconds: The median of its steps, in seconds.
        steps: Batches trained on.
        loss: The mean training loss.
        metric: The mean training metric; None where there is none.
        eval_loss: The loss on held-out data.
        eval_metric: The metric on held-out data.
        memory: Bytes: ``state`` of parameters, buffers and optimizer, and the ``peak``.
        effective_rank: By site, at the end of the epoch.
        stable_rank: By site, at the end of the epoch.
        truncated: ``eval_loss`` and ``eval_metric`` of the truncated model; of the last epoch.
        step: Optimizer steps of the run before it, where they are counted.
        spent_time: As ``spent``, by the measured times of the plan's sites; None where the plan has none.
        more: What else a training loop notes of it, by names of its own.
    """

    epoch: int
    phases: Mapping[str, Phase]
    ranks: Mapping[str, int] = field(default_factory=dict)
    lr: float
    reasons: tuple[str, ...] = ()
    epochs_to_cut: Mapping[str, int] = field(default_factory=dict)
    switch_error: Mapping[str, float] = field(default_factory=dict)
    switch_spectra: Mapping[str, Spectra] = field(default_factory=dict)
    switch_seconds: float = 0.0
    spent: float

    seconds: float | None = None
    step_seconds: float | None = None
    steps: int | None = None
    loss: float | None = None
    metric: float | None = None
    eval_loss: float | None = None
    eval_metric: float | None = None
    memory: Mapping[str, int] = field(default_factory=dict)
    effective_rank: Mapping[str, float] = field(default_factory=dict)
    stable_rank: Mapping[str, float] = field(default_factory=dict)
    truncated: Mapping[str, float | None] = field(default_factory=dict)
    step: int | None = None
    spent_time: float | None = None
    more: Mapping[str, object] = field(default_factory=dict)

    @property
    def unit(self) -> str:
        """What it is of the run: an ``epoch``, or a ``tick`` of a run that is counted in steps."""
        return "epoch" if self.step is None else "tick"

    @property
    def phase(self) -> str:
        """The phase of all sites, or how many are in which: ``FULL``, ``1 FULL 3 LOW``."""
        return summary(self.phases.values())

    def __getitem__(self, name: str) -> Any:  # Any: a field of any type, or a figure of the user's own
        """The field of this name, or what ``more`` has under it. Raises KeyError for neither."""
        return getattr(self, name) if name == "phase" or name in _FIELDS else self.more[name]

    def with_figures(self, **figures: Any) -> EpochRecord:  # Any: each is of its field's type
        """The record with more figures.

        Args:
            **figures: Fields, and figures under names of your own, which go to ``more``.

        Returns:
            The new record; this one stays as it is.
        """
        known = {name: value for name, value in figures.items() if name in _FIELDS}
        own = {name: value for name, value in figures.items() if name not in _FIELDS}
        return replace(self, **known, more={**self.more, **own})

    def to_json(self) -> JsonObject:
        """Plain values for JSON: phases by name, ``more`` beside the fields, and nothing of what is not known yet.

        A number that is not finite becomes None, as JSON has none.

        Returns:
            The object, for ``from_json``.
        """
        values = {"epoch": self.epoch, "phase": self.phase, **{name: getattr(self, name) for name in _FIELDS}}
        values["phases"] = {site: phase.name for site, phase in self.phases.items()}
        values["reasons"] = list(self.reasons)
        values["switch_spectra"] = {site: [list(s) for s in both] for site, both in self.switch_spectra.items()}
        unknown = [name for name in _LATER if getattr(self, _KNOWN_WITH.get(name, name)) in (None, {})]
        known = {name: value for name, value in values.items() if name not in unknown}
        plain: JsonObject = finite(known | dict(self.more))
        return plain

    @classmethod
    def from_json(cls, data: Mapping[str, Json]) -> EpochRecord:
        """The inverse of ``to_json``, of records of earlier versions too, which have fewer fields.

        Args:
            data: The object.

        Returns:
            The record.
        """
        values = {name: value for name, value in data.items() if name in _FIELDS}
        values["phases"] = {site: Phase[name] for site, name in data["phases"].items()}
        values["reasons"] = tuple(data.get("reasons", ()))
        spectra = data.get("switch_spectra", {}).items()
        values["switch_spectra"] = {site: (_floats(before), _floats(after)) for site, (before, after) in spectra}
        for name in ("switch_error", "effective_rank", "stable_rank"):
            sites = data.get(name, {})
            values[name] = dict(zip(sites, _floats(sites.values()), strict=True))
        more = {name: value for name, value in data.items() if name not in _FIELDS and name != "phase"}
        return cls(**values, more=more)


def _floats(values: Iterable[float | None]) -> tuple[float, ...]:
    return tuple(math.nan if value is None else value for value in values)


_FIELDS = tuple(each.name for each in fields(EpochRecord) if each.name != "more")
_LATER = _FIELDS[_FIELDS.index("seconds") :]
# None is a value of these, for a run without a metric, as soon as the other one is known.
_KNOWN_WITH = {"step_seconds": "steps", "metric": "loss", "eval_metric": "eval_loss"}
