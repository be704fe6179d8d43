"""The schedules that a command line can name. A new one is a file of its own and a line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..phase import Phase
from .auto import auto
from .fixed import Always, aligned, interleave, paper_cifar10, paper_cifar100
from .state import Schedule


@dataclass(frozen=True)
class NamedSchedule:
    """A schedule as it is asked for by name.

    Attributes:
        name: What the command line calls it.
        make: Makes it from keyword arguments, those of ``takes`` that have a value.
        takes: What of the things that can be given it takes: ``epochs`` and ``lr_milestones`` of the run, and the
            options ``cost``, ``low``, ``full`` and ``last``, the phase that follows FULL.
    """

    name: str
    make: Callable[..., Schedule]
    takes: tuple[str, ...] = ()

    def __call__(self, given: Mapping[str, object]) -> Schedule:
        """The schedule, by what it takes of what is given.

        Args:
            given: What is given, by name; None is nothing.

        Returns:
            The schedule.

        Raises:
            ScheduleError: As ``make`` does.
        """
        return self.make(**{name: given[name] for name in self.takes if given.get(name) is not None})


BY_NAME = (
    NamedSchedule("auto", auto, ("cost",)),
    NamedSchedule("aligned", aligned, ("epochs", "lr_milestones", "last")),
    NamedSchedule("interleave", interleave, ("low", "full")),
    NamedSchedule("low", lambda: Always(Phase.LOW)),
    NamedSchedule("full", lambda: Always(Phase.FULL)),
    NamedSchedule("paper-cifar10", paper_cifar10, ("last",)),
    NamedSchedule("paper-cifar100", paper_cifar100, ("last",)),
)
