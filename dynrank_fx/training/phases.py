"""A schedule at work: what begins every epoch, in our own loop and in any other."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..aliases import StateDict
from ..checks import check_epochs, check_schedule, is_whole
from ..errors import ScheduleError, StoreError, TransitionError
from ..phase import Phase, summary
from ..phases import (
    Optimizers,
    Transition,
    copy_factors_,
    enter_,
    forget_steps,
    note_steps,
    optimizers_in,
    phases_in,
    phases_of,
    randomize_,
    replan_,
)
from ..rewrite import plan_of, switched_modules
from ..schedules import Decision, EpochRecord, Schedule, Setting, Spectra, TrainState
from ..tracing import unwrap
from .factor_decay import factor_decay_
from .facts import check_epoch, cost_of, train_state
from .landing import Landing, epochs_to_cut
from .rewarm import Rewarm, rewarm_
from .settings import PhaseSettings

_POINTS = 64  # of a spectrum in a record


class Phases:
    """A schedule for a training loop of your own: ``begin(epoch)`` at the start of every epoch does the rest.

    Args:
        net: What ``transform`` made.
        optimizer: The optimizer over its parameters, or all of them; the schedule is told the learning rate of the
            first.
        schedule: Which phase each site is in, epoch by epoch; see ``dynrank_fx.schedules``.
        epochs: How many epochs the run has.
        lr_scheduler: The learning-rate scheduler; with it a schedule like ``auto`` knows the learning rates to come.
        steps: Optimizer steps of an epoch; ``landing`` needs them.
        lr_every_step: Whether the scheduler is stepped after every optimizer step, and not after every epoch.
        averages: What averages the net's weights (``AveragedModel``, ``ModelEmaV3``, a copy), to be brought along.
        settings: How phases are entered and left, see ``PhaseSettings``; by default its defaults.
        **choices: Fields of ``PhaseSettings`` that are chosen otherwise: ``carry``, ``rewarm``, ``decay``,
            ``random_init``, ``landing``, ``spectra``.

    Attributes:
        history: The record of every epoch begun, to which ``note`` adds.
        transition: What the last epoch began with.

    Raises:
        TransitionError: Without an optimizer; for one of which it is not known how it decays weights, where ``decay``
            asks for that; for a net that ``transform`` did not make, and for a choice that is none.
        ScheduleError: For what is no schedule, and for numbers of epochs or steps that cannot be.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: Optimizers,
        schedule: Schedule,
        epochs: int,
        lr_scheduler: LRScheduler | None = None,
        *,
        steps: int | None = None,
        lr_every_step: bool = False,
        averages: Sequence[object] = (),
        settings: PhaseSettings | None = None,
        **choices: Any,  # Any: each is of its field's type
    ) -> None:
        check_epochs(epochs)
        if steps is not None and not is_whole(steps, 1):
            raise ScheduleError(
                f"an epoch cannot have {steps!r} steps: give a whole number of 1 or more, or leave it out"
            )
        check_schedule(schedule)
        self.optimizers: tuple[Optimizer, ...] = optimizers_in(optimizer)
        if not self.optimizers:
            raise TransitionError("phases go with an optimizer: give the one over the net's parameters, or all of them")
        self.net, self.optimizer, self.schedule, self.epochs = net, self.optimizers[0], schedule, epochs
        self.averages = tuple(averages)
        self.lr_scheduler, self.steps, self.lr_every_step = lr_scheduler, steps, lr_every_step
        self.settings = replace(settings or PhaseSettings(), **choices)
        self.decay = factor_decay_(net, self.optimizers, self.settings.decay)
        self.landing = Landing(net, self.optimizers) if self.settings.landing else None
        for each in self.optimizers:
            note_steps(each)
        self.history: list[EpochRecord] = []
        self.transition = Transition(())
        self._rewarms: list[Rewarm] = []

    def begin(self, epoch: int) -> EpochRecord:
        """Bring the net into the phases of this epoch, and the optimizer along.

        Args:
            epoch: The epoch that begins, counted from 0.

        Returns:
            The record of the epoch.

        Raises:
            ScheduleError: For an epoch that is not of the run.
            TransitionError: As ``enter_`` does.
        """
        check_epoch(epoch, self.epochs)
        del self.history[epoch:]  # one that is begun again after a stop
        started = time.perf_counter()
        state = self._state(epoch)
        setting, before = self.schedule(state), phases_of(self.net)
        asked = phases_in(setting, before) if before else {}
        changing = [name for name, phase in asked.items() if phase is not before[name]]
        watched = changing if self.settings.spectra and epoch > 0 else []
        old = self._spectra(watched)
        self._enter(setting, epoch)
        phases = phases_of(self.net)
        cuts: dict[str, int] = {}
        if self.landing is not None and self.steps:
            cuts = epochs_to_cut(self.schedule, state, phases)
            self.landing.begin({name: count * self.steps for name, count in cuts.items()})
        record = EpochRecord(
            epoch=epoch,
            phases=phases,
            ranks={name: modules[0].rank for name, modules in switched_modules(unwrap(self.net)).items()},
            lr=float(self.optimizer.param_groups[0]["lr"]),
            reasons=tuple(setting.reasons) if isinstance(setting, Decision) else (),
            epochs_to_cut=cuts,
            switch_error={change.site: change.error for change in self.transition.changes},
            switch_spectra=_thinned(old, self._spectra(watched)),
            switch_seconds=time.perf_counter() - started,
            spent=state.spent + cost_of(self.net),
        )
        self.history.append(record)
        return record

    def _state(self, epoch: int) -> TrainState:
        """What the schedule is told."""
        return train_state(
            self.net,
            self.optimizer,
            epoch,
            self.epochs,
            self.lr_scheduler,
            steps_per_epoch=(self.steps or 1) if self.lr_every_step else 1,
            rates=[record.lr for record in self.history],
            spent=self.history[-1].spent if self.history else 0.0,
        )

    def _enter(self, setting: Setting, epoch: int) -> None:
        """The switch itself, and what goes with it."""
        split = self.landing.split if self.landing is not None else None
        self.transition = enter_(
            self.net, setting, self.optimizers, averages=self.averages, carry=self.settings.carry, split=split
        )
        if self.settings.random_init and epoch == 0 and Phase.LOW in phases_of(self.net).values():
            randomize_(self.net)
            copy_factors_(unwrap(self.net), self.averages)
        if self.transition and self.settings.rewarm and epoch > 0:
            for rewarm in self._rewarms:
                rewarm.stop()
            self._rewarms = [rewarm_(each, self.settings.rewarm) for each in self.optimizers]

    def note(self, **figures: object) -> EpochRecord:
        """Add figures to the record of the epoch that was begun last.

        Args:
            **figures: Such as ``loss=``, or any of your own.

        Returns:
            The record with them.

        Raises:
            ScheduleError: Where no epoch has begun.
        """
        if not self.history:
            raise ScheduleError("no epoch has begun whose figures these are: call begin(epoch) first")
        self.history[-1] = self.history[-1].with_figures(**figures)
        return self.history[-1]

    def _spectra(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The singular values of these sites, largest first."""
        sites = switched_modules(unwrap(self.net))
        return {name: sites[name][0].spectrum().flatten().sort(descending=True).values for name in names}

    def hooks_state(self) -> StateDict:
        """Where a re-warm-up and a landing stand.

        Returns:
            Plain values and tensors, for ``load_hooks_state``.
        """
        lefts = [rewarm.left for rewarm in self._rewarms]
        rewarm = [self._rewarms[0].steps, *lefts] if any(lefts) else None
        return {"rewarm": rewarm, "landing": self.landing.state() if self.landing is not None else None}

    def load_hooks_state(self, state: StateDict) -> None:
        """Go on with a re-warm-up and a landing from where they stood.

        Args:
            state: What ``hooks_state`` gave.
        """
        if state.get("rewarm"):
            steps, *lefts = state["rewarm"]
            self._rewarms = [Rewarm(each, steps, left) for each, left in zip(self.optimizers, lefts, strict=True)]
        if self.landing is not None and state.get("landing"):
            self.landing.load(state["landing"])

    def state_dict(self) -> StateDict:
        """What a checkpoint needs beside the net's and the optimizer's state.

        Returns:
            Plain values and tensors, for ``load_state_dict``.
        """
        return {"history": [record.to_json() for record in self.history], **self.hooks_state()}

    def load_state_dict(self, state: StateDict) -> None:
        """Go on from a checkpoint.

        ``resume_phases_`` has brought the net into its phases before its weights were loaded.

        Args:
            state: What ``state_dict`` gave.

        Raises:
            StoreError: For a state that is of something else.
        """
        self.history = _history_in(state)
        self.load_hooks_state(state)

    def remove(self) -> None:
        """Take all hooks off the optimizer."""
        self.decay.remove()
        if self.landing is not None:
            self.landing.remove()
        for rewarm in self._rewarms:
            rewarm.stop()
        for each in self.optimizers:
            forget_steps(each)


def _thinned(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, Spectra]:
    """Per site both spectra at the same up to 64 indices, evenly spread from first to last; zeros where the smaller one
    has ended.
    """
    thinned = {}
    for name in before:
        count = max(len(before[name]), len(after[name]))
        step = max(1.0, (count - 1) / (_POINTS - 1))
        chosen = [round(i * step) for i in range(min(count, _POINTS))]
        thinned[name] = (_at(before[name], chosen, count), _at(after[name], chosen, count))
    return thinned


def _at(spectrum: Tensor, chosen: list[int], count: int) -> tuple[float, ...]:
    """A spectrum, with zeros up to ``count`` values, at these indices, in four digits."""
    padded = torch.nn.functional.pad(spectrum, (0, count - len(spectrum)))
    return tuple(float(f"{value:.4g}") for value in padded[chosen].tolist())


def _history_in(state: StateDict) -> list[EpochRecord]:
    """The records in what ``Phases.state_dict`` gave. Raises StoreError for what is of something else."""
    try:
        return [EpochRecord.from_json(record) for record in state["history"]]
    except (LookupError, TypeError, AttributeError) as error:
        raise StoreError("the state holds no history of phases: give what Phases.state_dict() gave") from error


def phase_label(net: nn.Module) -> str:
    """``FULL``, ``LOW``, or how many sites are in which."""
    return summary(phases_of(net).values())


def resume_phases_(net: nn.Module, state: StateDict) -> None:
    """Bring a freshly transformed net into the phases of a checkpoint, so that its weights load by name.

    Call it before the optimizer is made, and before weights are loaded.

    Args:
        net: What ``transform`` made.
        state: What ``Phases.state_dict()`` gave.

    Raises:
        StoreError: For a state that is of something else.
        PlanError: For ranks that a site cannot have.
        TransitionError: For sites that the net does not have.
    """
    history = _history_in(state)
    if not history:
        return
    last = history[-1]
    plan = {name: modules[0].rank for name, modules in switched_modules(unwrap(net)).items()}
    ranks = {name: rank for name, rank in last.ranks.items() if plan.get(name) != rank}
    if ranks:
        replan_(net, plan_of(net).with_ranks(ranks))
    enter_(net, last.phases)
