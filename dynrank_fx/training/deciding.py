"""What a schedule decides where several processes train: the first asks it, and tells the others.

Spectra differ from process to process in their last digits, and what a schedule draws at random in all. Where the
weights are in parts, the others wait for the names of those that the schedule looks at, and lend their parts of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

from torch import nn

from ..errors import ScheduleError, telling
from ..processes import Processes, is_sharded
from ..rewrite import switched_modules
from ..schedules import Decision, Schedule, Setting, TrainState
from ..tracing import unwrap

T = TypeVar("T")


class SitesSpectra(Mapping[str, tuple[float, ...]]):
    """Singular values by site, computed when a schedule looks at them.

    Args:
        net: The net.

    Attributes:
        ask: What is called with the name of a site before its parts are gathered.
    """

    def __init__(self, net: nn.Module) -> None:
        self._sites = switched_modules(unwrap(net))
        self._known: dict[str, tuple[float, ...]] = {}
        self.in_parts = any(is_sharded(module) for module in net.modules())
        self.ask: Callable[[str], object] | None = None

    def __getitem__(self, name: str) -> tuple[float, ...]:
        if name not in self._known:
            module = self._sites[name][0]
            if self.ask is not None:
                self.ask(name)
            values = module.spectrum().flatten().sort(descending=True).values
            self._known[name] = tuple(values.tolist())
        return self._known[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)


def asked_of(schedule: Schedule, state: TrainState) -> Setting | Decision:
    """What a schedule, which may be anybody's, says of a state. Raises ScheduleError for what it raises."""
    with telling(f"the schedule {schedule!r}, asked of {state.unit} {state.epoch},", ScheduleError):
        return schedule(state)


def decided(processes: Processes, state: TrainState, decide: Callable[[], T]) -> T:
    """What is decided of this state in the first process, in all. Where that fails, all raise."""
    spectra = state.spectra
    if processes.count == 1 or not isinstance(spectra, SitesSpectra) or not spectra.in_parts:
        return processes.from_one(0, decide, ScheduleError, "the schedule")
    if processes.first:
        decide = _asked(processes, spectra, decide)
    else:
        while (name := _told(processes, None)) is not None:
            spectra[name]
    return processes.from_one(0, decide, ScheduleError, "the schedule")


def _asked(processes: Processes, spectra: SitesSpectra, decide: Callable[[], T]) -> Callable[[], T]:
    """Decide, while the others lend their parts; what gives the decision, or raises what it came to."""
    decision: T
    failure: BaseException | None = None
    spectra.ask = lambda name: _told(processes, name)
    try:
        decision = decide()
    except BaseException as error:
        failure = error
    finally:
        spectra.ask = None
        _told(processes, None)

    def give() -> T:
        if failure is not None:
            raise failure
        return decision

    return give


def _told(processes: Processes, name: str | None) -> str | None:
    """The name of a site that the first process asks for; None where it asks no more."""
    return processes.from_one(0, lambda: name, ScheduleError, "the schedule")
