"""A schedule at work: what happens at the start of every epoch, in our own loop and, by ``Phases``, in any other."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from .decay import Decay, factor_decay_
from .landing import Landing, epochs_to_cut
from .net import unwrap
from .optim import Carry, Rewarm, rewarm_
from .phase import Phase, Schedule, Setting, TrainState
from .rewrite import plan_of
from .state import cost_of, train_state
from .switched import switched_modules
from .transition import Transition, enter_, phases_of, randomize_, replan_

_POINTS = 64  # of a spectrum in a record


def begin_epoch_(
    net: nn.Module,
    optimizer: Optimizer,
    schedule: Schedule,
    state: TrainState,
    *,
    carry: Carry = Carry.MOVE,
    random_init: bool = False,
    spectra: bool = True,
    landing: Landing | None = None,
    steps: int | None = None,
) -> tuple[Transition, dict[str, Any]]:
    """Ask the schedule, enter what it says, and record it.

    The record has phase, phases and ranks of the sites, the learning rate, the reasons, what a switch did to every site
    (``switch_error``, relative; ``switch_spectra``, before and after), and ``spent``: compute to the end of the epoch,
    in dense epochs. random_init: factors at epoch 0 are random. spectra: record those of the sites that switch.
    landing: is told how many steps are left until each cut; steps: of an epoch, None where that is not known yet.
    """
    started = time.perf_counter()
    setting = schedule(state)
    changing = _changing(net, setting) if spectra and state.epoch > 0 else ()
    before = _spectra(net, changing)
    transition = enter_(net, setting, optimizer, carry=carry)
    if random_init and state.epoch == 0 and Phase.LOW in phases_of(net).values():
        randomize_(net)
    cuts = epochs_to_cut(schedule, state, phases_of(net)) if landing is not None and steps else {}
    if landing is not None:
        landing.begin({name: epochs * (steps or 0) for name, epochs in cuts.items()})
    seconds = time.perf_counter() - started
    after = _spectra(net, changing)
    return transition, {
        "epoch": state.epoch,
        "phase": phase_label(net),
        "phases": {name: phase.name for name, phase in phases_of(net).items()},
        "ranks": {name: modules[0].rank for name, modules in switched_modules(unwrap(net)).items()},
        "lr": state.lr,
        "reasons": list(getattr(setting, "reasons", ())),
        "epochs_to_cut": cuts,
        "switch_error": {change.site: change.error for change in transition.changes},
        "switch_spectra": {name: [before[name], after[name]] for name in changing},
        "switch_seconds": seconds,
        "spent": state.spent + cost_of(net),
    }


def _changing(net: nn.Module, setting: Setting) -> tuple[str, ...]:
    """The sites that a phase for all, or for each by its full name, will switch."""
    phases = phases_of(net)
    if isinstance(setting, Mapping):
        return tuple(name for name, phase in setting.items() if phases.get(name, phase) != phase)
    return tuple(name for name, phase in phases.items() if phase != setting)


def _spectra(net: nn.Module, names: tuple[str, ...]) -> dict[str, list[float]]:
    """Singular values by site, at up to 64 indices evenly spread from first to last."""
    sites = switched_modules(unwrap(net))
    return {name: _thinned(sites[name][0].spectrum()) for name in names}


def _thinned(spectrum: Tensor) -> list[float]:
    values = spectrum.flatten().sort(descending=True).values
    count = len(values)
    chosen = (
        sorted({round(i * (count - 1) / (_POINTS - 1)) for i in range(_POINTS)}) if count > _POINTS else range(count)
    )
    return [float(f"{values[i]:.4g}") for i in chosen]


def phase_label(net: nn.Module) -> str:
    """``FULL``, ``LOW``, or how many sites are in which."""
    phases = list(phases_of(net).values())
    counts = [(phase.name, phases.count(phase)) for phase in Phase if phase in phases]
    return counts[0][0] if len(counts) == 1 else " ".join(f"{count} {name}" for name, count in counts)


class Phases:
    """A schedule for a training loop of one's own: ``begin(epoch)`` at the start of every epoch does the rest.

    lr_scheduler: with it, a schedule like ``auto`` knows the learning rates to come. steps: batches of an epoch.
    lr_every_step: the scheduler is stepped after every batch. carry, rewarm, decay, random_init, landing (which needs
    steps): as in ``Settings``. ``history`` has a record of every
    epoch begun (see ``begin_epoch_``), to which the loop may add; ``state_dict()`` and ``load_state_dict()`` keep it.

    Raises TransitionError as ``enter_`` and ``factor_decay_`` do.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: Optimizer,
        schedule: Schedule,
        epochs: int,
        lr_scheduler: Any = None,
        *,
        steps: int | None = None,
        lr_every_step: bool = False,
        carry: Carry = Carry.MOVE,
        rewarm: int = 0,
        decay: Decay = Decay.EACH,
        random_init: bool = False,
        landing: bool = False,
    ) -> None:
        self.net, self.optimizer, self.schedule, self.epochs = net, optimizer, schedule, epochs
        self.lr_scheduler, self.steps, self.lr_every_step = lr_scheduler, steps, lr_every_step
        self.carry, self.rewarm, self.random_init = carry, rewarm, random_init
        self.decay = factor_decay_(net, optimizer, decay)
        self.landing = Landing(net, optimizer) if landing else None
        self.history: list[dict[str, Any]] = []
        self._rewarm: Rewarm | None = None

    def begin(self, epoch: int) -> dict[str, Any]:
        """Bring the net into the phases of this epoch, the optimizer along; returns the record of it."""
        del self.history[epoch:]  # one that is begun again after a stop
        state = train_state(
            self.net,
            self.optimizer,
            epoch,
            self.epochs,
            self.lr_scheduler,
            steps_per_epoch=(self.steps or 1) if self.lr_every_step else 1,
            rates=[record["lr"] for record in self.history],
            spent=self.history[-1]["spent"] if self.history else 0.0,
        )
        transition, record = begin_epoch_(
            self.net,
            self.optimizer,
            self.schedule,
            state,
            carry=self.carry,
            random_init=self.random_init,
            landing=self.landing,
            steps=self.steps,
        )
        if transition and self.rewarm and epoch > 0:
            if self._rewarm is not None:
                self._rewarm.stop()
            self._rewarm = rewarm_(self.optimizer, self.rewarm)
        self.history.append(record)
        return record

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs beside the net's and the optimizer's state: plain values and tensors."""
        left = [self._rewarm.steps, self._rewarm.left] if self._rewarm is not None else None
        landing = self.landing.state() if self.landing is not None else None
        return {"history": self.history, "rewarm": left, "landing": landing}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there; ``resume_phases_`` has brought the net into its phases before its weights were loaded."""
        self.history = list(state["history"])
        if state["rewarm"]:
            self._rewarm = Rewarm(self.optimizer, *state["rewarm"])
        if self.landing is not None and state["landing"]:
            self.landing.load(state["landing"])


def resume_phases_(net: nn.Module, state: Mapping[str, Any]) -> None:
    """Bring a freshly transformed net into the phases of a ``Phases.state_dict()``, so that its weights load by name.

    Before the optimizer is made, and before weights are loaded. Raises PlanError for ranks that a site cannot have.
    """
    if not state["history"]:
        return
    last = state["history"][-1]
    plan = {name: modules[0].rank for name, modules in switched_modules(unwrap(net)).items()}
    ranks = {name: rank for name, rank in last["ranks"].items() if plan.get(name) != rank}
    if ranks:
        replan_(net, plan_of(net).with_ranks(ranks))
    enter_(net, {name: Phase[phase] for name, phase in last["phases"].items()})
