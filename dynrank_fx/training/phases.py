"""A schedule at work: what begins every tick of a run, in our own loop and in any other."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..aliases import StateDict
from ..checks import check_flags, check_schedule, is_list, is_whole
from ..errors import DynrankWarning, ScheduleError, StoreError, TransitionError
from ..phase import Phase, summary
from ..phases import (
    Optimizers,
    Transition,
    agree_before,
    agree_on_origin,
    averages_in,
    copy_factors_,
    enter_,
    forget_steps,
    infinite_buffers,
    modules_of,
    not_finite,
    note_steps,
    optimizers_in,
    phases_in,
    phases_of,
    randomize_,
    refuse_wrapped,
    warn_of,
)
from ..processes import Shards, agree, check_wrapper, ignored_by, processes_training, wrappers_of
from ..rewrite import LOADED, plan_of, switched_modules
from ..schedules import Decision, EpochRecord, Schedule, Setting, TrainState
from ..text import counted, rounded
from ..tracing import meta_of, unwrap
from .clock import Clock, SkipHook, StepHook, clock_of, refuse_second, refuse_unwrapped
from .costs import CostBy, check_costs, cost_of, is_timed, warn_of_budget
from .deciding import asked_of, decided
from .factor_decay import factor_decay_
from .factor_steps import factor_steps_
from .facts import check_epoch, check_scheduler, rates_after, state_at, warn_of_rates
from .history import add_
from .landing import Landing, epochs_to_cut
from .records import NO_STATE, history_in, last_of, rates_so_far, thinned
from .resume import RESUMED
from .rewarm import Rewarm
from .settings import PhaseSettings
from .starts import Starts


class Phases:
    """A schedule for a training loop of your own, which goes by the optimizer's steps.

    With ``steps`` the loop needs no other line: the schedule decides when the ``Phases`` is made, and again at every
    tick, right after the optimizer step before it. A tick is an epoch; in a run that is given in steps alone, or has
    one epoch, it is a twentieth of the run. Up to five epochs are divided into twenty ticks in all for a schedule that
    does not count epochs (``within_epochs``, as of ``auto``). A loop that has work to do between the last step of an
    epoch and the switch (evaluation, a scheduler by epochs) calls ``begin(epoch)`` at the start of every epoch, and
    then decides the time.

    What counts are steps of the optimizers that are given; those of others move no clock. A step that a ``GradScaler``
    skips, since gradients overflowed, counts where the scaler is given: the loop counts it as well. Without it the
    clock is late by as many steps, and a run of few steps may end before its last tick.

    Args:
        net: What ``transform`` made.
        optimizer: The optimizer over its parameters, or all of them; the schedule is told the learning rate of the
            first.
        schedule: Which phase each site is in, tick by tick; see ``dynrank_fx.schedules``.
        epochs: How many epochs the run has; left out where it is counted in steps.
        lr_scheduler: The learning-rate scheduler; with it a schedule like ``auto`` knows the learning rates to come.
        steps: Optimizer steps of each epoch or, without ``epochs``, of the run. Of gradients that are accumulated, a
            step is one, whatever the number of batches.
        every: Optimizer steps of a tick, where it shall be neither an epoch nor a twentieth of the run.
        lr_every_step: Whether the scheduler is stepped after every optimizer step, and not after every epoch; by
            default so where there are no epochs.
        averages: What averages the net's weights (``AveragedModel``, ``ModelEmaV3``, a copy), to be brought along.
        scaler: The ``GradScaler`` of the loop, whose skipped steps count.
        by_itself: Whether ticks begin by themselves; with False, ``begin`` begins each.
        clock: The ticks of the run, in place of ``epochs``, ``steps`` and ``every``: for hooks into other trainers.
        resume: What ``state_dict`` gave, to go on from; the net was brought into its phases by ``resume_phases_``.
        settings: How phases are entered and left, see ``PhaseSettings``; by default its defaults.
        **choices: Fields of ``PhaseSettings`` that are chosen otherwise: ``carry``, ``rewarm``, ``decay``,
            ``factor_steps``, ``random_init``, ``landing``, ``spectra``, ``cost_by``.

    Attributes:
        clock: The ticks of the run.
        step: Optimizer steps made so far.
        history: The record of every tick begun, to which ``note`` adds.
        transition: What the last tick began with.

    Raises:
        TransitionError: Without an optimizer; for one of which it is not known how it decays weights, where ``decay``
            asks for that; for a net that ``transform`` did not make, for a choice that is none, for a net that
            nothing wraps where several processes run, and where processes begin with different ones.
        ScheduleError: For what is no schedule, for numbers of epochs or steps that cannot be, where neither is given,
            and where costs are to be counted in time and the plan has none.
        StoreError: For a state to resume from that is of something else.

    Warns:
        DynrankWarning: Where the schedule's budget is below what LOW alone costs, or the scheduler's number of steps is
            not the run's.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: Optimizers,
        schedule: Schedule,
        epochs: int | None = None,
        lr_scheduler: LRScheduler | None = None,
        *,
        steps: int | None = None,
        every: int | None = None,
        lr_every_step: bool | None = None,
        averages: object = (),
        scaler: torch.amp.GradScaler | None = None,
        by_itself: bool = True,
        clock: Clock | None = None,
        resume: StateDict | None = None,
        settings: PhaseSettings | None = None,
        **choices: Any,  # Any: each is of its field's type
    ) -> None:
        refuse_wrapped(net)
        if not isinstance(net, nn.Module):
            raise TransitionError(f"a {type(net).__name__} is no net: give the net first, and then the optimizer")
        self._together = processes_training(net)
        refuse_unwrapped(self._together)
        kinds = (
            ("clock", clock, Clock),
            ("settings", settings, PhaseSettings),
            ("scaler", scaler, torch.amp.GradScaler),
        )
        for name, given, kind in kinds:
            if given is not None and not isinstance(given, kind):
                raise ScheduleError(f"{name} is {given!r}: give a {kind.__name__}, or leave it out")
        check_flags(ScheduleError, by_itself=by_itself, lr_every_step=lr_every_step is not None and lr_every_step)
        check_schedule(schedule)
        if clock is None:
            clock = clock_of(epochs, steps, every)
            clock = clock.divided(schedule) if by_itself else clock
        self.clock = clock
        self.optimizers: tuple[Optimizer, ...] = optimizers_in(optimizer)
        if not self.optimizers:
            raise TransitionError("phases go with an optimizer: give the one over the net's parameters, or all of them")
        for each in self.optimizers:
            refuse_second(each)
        check_scheduler(lr_scheduler, self.optimizers)
        self.net, self.optimizer, self.schedule, self.lr_scheduler = net, self.optimizers[0], schedule, lr_scheduler
        self.averages = averages_in(averages)
        self.lr_every_step = clock.per_epoch is None and not clock.by_epochs if lr_every_step is None else lr_every_step
        self.settings = replace(settings or PhaseSettings(), **choices)
        check_costs(net, self.settings.cost_by)
        warn_of_rates(lr_scheduler, clock, self.lr_every_step)
        # Before the decay, which is not to be shortened.
        self.factor_steps = factor_steps_(net, self.optimizers, self.settings.factor_steps)
        self.decay = factor_decay_(net, self.optimizers, self.settings.decay)
        warn_of_budget(schedule, plan_of(net), self.settings.cost_by)
        self.landing = Landing(net, self.optimizers) if self.settings.landing else None
        self._starts = Starts(self.landing)
        # All hooks are there from the start, since torch is walking through them when a tick begins, which comes last.
        self._rewarms = [Rewarm(each, 0) for each in self.optimizers] if self.settings.rewarm else []
        for each in self.optimizers:
            note_steps(each)
        self._hook = StepHook(self.optimizers, self._stepped)
        self._skips = SkipHook(scaler, self.optimizers, self._skipped) if scaler is not None else None
        self.step, self._told = 0, False
        meta_of(unwrap(net)).pop(LOADED, None)
        self.history: list[EpochRecord] = []
        self._earlier: list[float] = []  # learning rates of the ticks before the first of the history
        self._unbounded = infinite_buffers(net)
        self.transition = Transition(())
        self._by_itself = by_itself and clock.every is not None
        self._waits = False  # whether the first tick of an epoch waits for begin()
        try:
            if resume is not None:
                with self._together.all_or_none(StoreError, "going on from a checkpoint"):
                    self.load_state_dict(resume)
            agree_before(self._together, unwrap(net), self.optimizers, ignored_by(wrappers_of(net)))
            agree_on_origin(self._together, unwrap(net))
            if resume is None and self._by_itself and RESUMED not in meta_of(unwrap(net)):
                self.begin_tick(0)
        except BaseException:
            self.remove()
            raise

    def __repr__(self) -> str:
        clock, tick = self.clock, self.begun
        if tick >= clock.ticks:
            coming = "no decision to come"
        elif self._by_itself and not (self._waits and clock.begins_epoch(tick)):
            coming = f"the next decision after step {clock.start(tick)}"
        else:
            coming = f"the next decision by begin({tick // clock.parts})"
        return f"Phases({clock.unit} {tick} of {clock.ticks}, step {self.step}, {phase_label(self.net)}; {coming})"

    @property
    def begun(self) -> int:
        """How many ticks have begun, those before the history's first one too."""
        return self.history[-1].epoch + 1 if self.history else 0

    def is_due(self, epoch: int) -> bool:
        """Whether this epoch is one that ``begin`` begins, and not one that a checkpoint has begun.

        Args:
            epoch: The epoch, counted from 0.

        Returns:
            True where ``begin`` is to be called.
        """
        parts = self.clock.parts
        first = parts > 1 and self.step == 0 and not self._waits  # it has begun by itself; from its call on others wait
        return self.clock.begins_epoch(epoch * parts) and (epoch * parts >= self.begun or first)

    def begin(self, epoch: int) -> EpochRecord:
        """Bring the net into the phases of this epoch, and the optimizer along.

        Args:
            epoch: The epoch that begins, counted from 0; the tick, in a run without epochs. Those to come wait for this
                call too, and ticks within an epoch go on to begin by themselves.

        Returns:
            The record of the epoch.

        Raises:
            ScheduleError: For an epoch that is not of the run.
            TransitionError: As ``enter_`` does.
        """
        check_epoch(epoch, self.clock.ticks // self.clock.parts)
        begun = self._by_itself and self.begun == epoch + 1 == 1 and self.step == 0
        self._by_itself = self._by_itself and not self.clock.by_epochs
        self._waits = self.clock.parts > 1
        return self.history[0] if begun else self.begin_tick(epoch * self.clock.parts)

    def _stepped(self) -> None:
        """After every optimizer step: the next tick, where it is time."""
        self.step += 1
        if meta_of(unwrap(self.net)).pop(LOADED, False):
            raise TransitionError(
                "weights of other phases were loaded into the net after the optimizer was made, which does not train "
                "them: make the optimizer, and Phases, after the weights are loaded"
            )
        if not self._by_itself:
            self._tell_where_nothing_begins()
            return
        if not self.history:
            raise ScheduleError(
                "the net is in the phases of a checkpoint, but where the run stood is not known: give Phases the state "
                "by load_state_dict, or as resume="
            )
        tick = self.begun
        waits = self._waits and self.clock.begins_epoch(tick)
        if tick < self.clock.ticks and self.step >= self.clock.start(tick) and not waits:
            self.begin_tick(tick, stepped=True)

    def _skipped(self, optimizer: Optimizer) -> None:
        """In the place of a step that overflowed: it counts, and a landing has one less to come."""
        if self.landing is not None:
            self.landing.step(optimizer)
        self._hook.count(optimizer)

    def _tell_where_nothing_begins(self) -> None:
        if not self.history and not self._told:
            self._told = True
            warnings.warn(
                "a step was made, and no epoch has begun: call phases.begin(epoch) at the start of each, or give "
                "Phases the steps of an epoch",
                DynrankWarning,
                stacklevel=2,
            )

    def begin_tick(self, tick: int, stepped: bool = False) -> EpochRecord:
        """As ``begin``, of a tick, where an epoch may have several.

        Args:
            tick: The tick that begins, counted from 0.
            stepped: Whether it begins right after an optimizer step, before the scheduler's.

        Returns:
            The record of the tick.

        Raises:
            TransitionError: As ``enter_`` does.
            ScheduleError: For a tick of which the state that training goes on from has no record.
        """
        for wrapper in wrappers_of(self.net):
            check_wrapper(wrapper)
        agree(
            self._together,
            {"the clock of the run": repr(self.clock), "the tick that begins": tick, "the optimizer step": self.step},
            TransitionError,
            "give all the same number of steps, of batches to each as many (DistributedSampler, drop_last=True)",
        )
        self._forget(tick)
        meta_of(unwrap(self.net)).pop(RESUMED, None)
        started = time.perf_counter()
        clock = self.clock
        if clock.every is not None and not stepped:  # which counts itself
            self.step = clock.start(tick)
        state = self._state(tick, stepped)
        setting = decided(self._together, state, lambda: _plain(asked_of(self.schedule, state)))
        before = phases_of(self.net)
        asked = phases_in(setting, before) if before else {}
        changing = [name for name, phase in asked.items() if phase is not before[name]]
        watched = [name for name in changing if asked[name] is Phase.LOW and self.settings.spectra and tick > 0]
        old = self._spectra(watched)
        self._enter(setting, tick, changing)
        phases = phases_of(self.net)
        cuts: dict[str, int] = {}
        if self.landing is not None and clock.every is not None:
            cuts = decided(self._together, state, lambda: epochs_to_cut(self.schedule, state, phases))
            self.landing.begin({name: clock.start(tick + count) - self.step for name, count in cuts.items()})
        record = EpochRecord(
            epoch=tick,
            phases=phases,
            ranks={name: modules[0].rank for name, modules in switched_modules(unwrap(self.net)).items()},
            lr=float(self.optimizer.param_groups[0]["lr"]) if state.lr is None else state.lr,
            reasons=tuple(setting.reasons) if isinstance(setting, Decision) else (),
            epochs_to_cut=cuts,
            switch_error={change.site: rounded(change.error, 6) for change in self.transition.changes},
            switch_spectra=thinned(old, self._spectra(watched)),
            switch_seconds=time.perf_counter() - started,
            spent=(self.history[-1].spent if self.history else 0.0) + cost_of(self.net),
            step=None if clock.by_epochs else self.step,
            spent_time=self._time_with(cost_of(self.net, CostBy.TIME)) if is_timed(plan_of(self.net)) else None,
        )
        add_(self.history, record)
        return record

    def _forget(self, tick: int) -> None:
        """The records of a tick that is begun again after a stop, and of those after it."""
        if 0 < tick <= len(self._earlier):
            raise ScheduleError(
                f"{self.clock.unit} {tick} cannot begin again, since the state that training goes on from has no "
                f"record of the one before it, but only from {len(self._earlier)} on: begin a later one, or 0"
            )
        while self.history and self.history[-1].epoch >= tick:
            self.history.pop()
        del self._earlier[tick:]

    def _state(self, tick: int, stepped: bool) -> TrainState:
        """What the schedule is told."""
        return state_at(
            self.net,
            self.optimizer,
            tick,
            self.clock.ticks,
            self._rates(tick, stepped),
            rates=rates_so_far(self._earlier, self.history, tick),
            spent=self._spent(),
            unit=self.clock.unit,
            cost_by=self.settings.cost_by,
        )

    def _spent(self) -> float:
        """So far, in what costs are counted in."""
        if not self.history or self.settings.cost_by is CostBy.FLOPS:
            return self.history[-1].spent if self.history else 0.0
        so_far = self._time_with(0.0)
        if so_far is None:
            raise ScheduleError(
                "the run's records so far tell no measured time, by which costs are to be counted from now on: go on "
                "with cost_by=CostBy.FLOPS"
            )
        return so_far

    def _time_with(self, more: float) -> float | None:
        """Measured time to the last tick, and so much more; None where its record does not tell."""
        so_far = self.history[-1].spent_time if self.history else 0.0
        return None if so_far is None else so_far + more

    def _rates(self, tick: int, stepped: bool) -> tuple[float, ...]:
        """The learning rate of this tick and of all that follow; empty where it is not known."""
        clock, every_step = self.clock, self.lr_every_step
        at = [clock.scheduler_steps(i, every_step) for i in range(tick, clock.ticks)]
        counts = [count for count in at if count is not None]
        if self.lr_scheduler is not None and len(counts) < len(at):
            return ()
        # Where an epoch ends with the step that was just made, the scheduler's step is still to come.
        epoch_ends = clock.by_epochs or (clock.per_epoch is not None and self.step % clock.per_epoch == 0)
        due = int(stepped and (every_step or epoch_ends))
        counts = [count - counts[0] + due for count in counts] or [0] * len(at)
        return rates_after(self.optimizer, self.lr_scheduler, counts)

    def _enter(self, setting: Setting, tick: int, changing: Sequence[str]) -> None:
        """The switch itself, and what goes with it."""
        # Sites in parts are cut as they lie, where the cut finds the best factors by itself.
        parts = bool(Shards([self.net]))
        best = parts and all(row.layout.exact for row in plan_of(self.net).sites)
        left = {} if parts else self._starts.of_factors(self.net, changing)
        self.transition = enter_(
            self.net,
            setting,
            self.optimizers,
            averages=self.averages,
            carry=self.settings.carry,
            split=None if best else self._starts.split,
        )
        self._starts.switched(phases_of(self.net), left)
        if self.settings.random_init and tick == 0 and Phase.LOW in phases_of(self.net).values():
            randomize_(self.net)
            copy_factors_(unwrap(self.net), self.averages)
        if self.transition and tick > 0:
            for rewarm in self._rewarms:
                rewarm.restart(self.settings.rewarm)

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

    def diverged(self) -> str | None:
        """What has become infinite or not a number since the ``Phases`` was made: a training that has diverged.

        Of a net in parts (FSDP2) each process looks at its own, so that one may see what others do not.

        Returns:
            The name of the first weight, buffer or state of the optimizer, or the learning rate, that is not finite;
            where all are, that of an average's weight or buffer; else None.
        """
        found = not_finite(self.net, self.optimizers, but=self._unbounded)
        of_averages = (not_finite(each, ()) for each in modules_of(self.averages))
        return found or next((f"{what} of an average" for what in of_averages if what is not None), None)

    def hooks_state(self) -> StateDict:
        """Where the steps, a re-warm-up and a landing stand, and where cuts begin.

        Returns:
            Plain values and tensors, for ``load_hooks_state``.
        """
        lefts = [rewarm.left for rewarm in self._rewarms]
        return {
            "step": self.step,
            "rewarm": [self._rewarms[0].steps, *lefts] if any(lefts) else None,
            "landing": self.landing.state() if self.landing is not None else None,
            "starts": self._starts.state(),
            "waits": self._waits,
        }

    def load_hooks_state(self, state: StateDict) -> None:
        """Go on with the steps, a re-warm-up and a landing from where they stood.

        Args:
            state: What ``hooks_state`` gave.

        Raises:
            StoreError: For a state that is of something else.
        """
        # Before steps were counted, a state was that of the end of an epoch.
        step, rewarm = state.get("step", self.clock.start(self.begun)), state.get("rewarm") or ()
        if not is_whole(step) or not is_list(rewarm) or not all(map(is_whole, rewarm)):
            raise StoreError(NO_STATE)
        self.step = step
        self._waits = bool(state.get("waits", False))
        if self._rewarms and rewarm:
            steps, *lefts = state["rewarm"]
            if len(lefts) != len(self._rewarms):
                raise StoreError(
                    f"the state is of {counted(len(lefts), 'optimizer')}, and Phases has {len(self._rewarms)}: give "
                    "the same ones"
                )
            for each, left in zip(self._rewarms, lefts, strict=True):
                each.restart(steps, left)
        self._starts.load(state.get("starts", {}))
        if self.landing is not None and state.get("landing"):
            self.landing.load(state["landing"])

    def state_dict(self) -> StateDict:
        """What a checkpoint needs beside the net's and the optimizer's state, between any two steps.

        It stays small however long the run is: it has the last records, as many as take a megabyte, and of earlier
        ticks the learning rate alone. Where all records are wanted after a stop, keep them beside it
        (``record.to_json()``).

        Returns:
            Plain values and tensors, for ``load_state_dict``.

        Warns:
            DynrankWarning: Where weights, buffers, the optimizer's state or the learning rate are not finite, and the
                checkpoint is none to go on from.
        """
        warn_of(self.diverged())
        history = last_of(self.history)
        rates = rates_so_far(self._earlier, self.history, self.begun)[: history[0]["epoch"]] if history else []
        return {"history": history, "rates": rates, **self.hooks_state()}

    def load_state_dict(self, state: StateDict) -> None:
        """Go on from a checkpoint.

        ``resume_phases_`` has brought the net into its phases before its weights were loaded.

        Args:
            state: What ``state_dict`` gave.

        Raises:
            StoreError: For a state that is of something else, or of other phases than the net is in.
        """
        earlier, history = history_in(state)
        if history and history[-1].phases != phases_of(self.net):
            raise StoreError(
                "the net is in other phases than the state is of: call resume_phases_(net, state) before its weights "
                "are loaded and Phases is made"
            )
        if history:
            self._earlier, self.history = earlier, history
            if history[0].unit == "epoch":  # a run that was begun before epochs were divided goes on in them
                self.clock = self.clock.whole()
            else:  # and one that gets another length goes on in its ticks
                self.clock = self.clock.going_on({record.epoch: record.step or 0 for record in history})
                self._by_itself = self._by_itself or self.clock.parts > 1
        meta_of(unwrap(self.net)).pop(RESUMED, None)
        self.load_hooks_state(state)

    def remove(self) -> None:
        """Take all hooks off the optimizer."""
        self.factor_steps.remove()
        self.decay.remove()
        self._hook.remove()
        if self._skips is not None:
            self._skips.remove()
        if self.landing is not None:
            self.landing.remove()
        for rewarm in self._rewarms:
            rewarm.stop()
        for each in self.optimizers:
            forget_steps(each)


def _plain(setting: Setting) -> Setting:
    """A setting that can be sent."""
    if isinstance(setting, Decision):
        return Decision(dict(setting.phases), tuple(setting.reasons))
    return dict(setting) if isinstance(setting, Mapping) else setting


def phase_label(net: nn.Module) -> str:
    """``FULL``, ``LOW``, or how many sites are in which."""
    return summary(phases_of(net).values())
