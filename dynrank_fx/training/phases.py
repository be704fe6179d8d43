"""A schedule at work: what begins every epoch, in our own loop and in any other."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..phase import Phase
from ..phases import Carry, Transition, enter_, phases_in, phases_of, randomize_, replan_
from ..rewrite import plan_of, switched_modules
from ..schedules import Schedule
from ..tracing import unwrap
from .factor_decay import Decay, factor_decay_
from .facts import cost_of, train_state
from .landing import Landing, epochs_to_cut
from .rewarm import Rewarm, rewarm_

_POINTS = 64  # of a spectrum in a record


class Phases:
    """A schedule for a training loop: ``begin(epoch)`` at the start of every epoch does the rest.

    lr_scheduler: with it, a schedule like ``auto`` knows the learning rates to come. steps: optimizer steps of an
    epoch. lr_every_step: the scheduler is stepped after every one. carry, rewarm, decay, random_init, landing (which
    needs steps), spectra: as in ``Settings``. ``history`` has a record of every epoch begun, to which the loop may add;
    ``state_dict()`` and ``load_state_dict()`` keep it. ``transition`` is what the last epoch began with.

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
        spectra: bool = True,
    ) -> None:
        self.net, self.optimizer, self.schedule, self.epochs = net, optimizer, schedule, epochs
        self.lr_scheduler, self.steps, self.lr_every_step = lr_scheduler, steps, lr_every_step
        self.carry, self.rewarm, self.random_init, self.spectra = carry, rewarm, random_init, spectra
        self.decay = factor_decay_(net, optimizer, decay)
        self.landing = Landing(net, optimizer) if landing else None
        self.history: list[dict[str, Any]] = []
        self.transition = Transition(())
        self._rewarm: Rewarm | None = None

    def begin(self, epoch: int) -> dict[str, Any]:
        """Bring the net into the phases of this epoch, the optimizer along; returns the record of it.

        The record has the phases and ranks of the sites, the learning rate, the reasons, the epochs until each site is
        cut, what a switch did to every site (``switch_error``, relative; ``switch_spectra``, before and after), and
        ``spent``: compute to the end of the epoch, in dense epochs.
        """
        del self.history[epoch:]  # one that is begun again after a stop
        started = time.perf_counter()
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
        setting, before = self.schedule(state), phases_of(self.net)
        asked = phases_in(setting, before) if before else {}
        changing = [name for name, phase in asked.items() if phase is not before[name]]
        watched = changing if self.spectra and epoch > 0 else []
        old = self._spectra(watched)
        split = self.landing.split if self.landing is not None else None
        self.transition = enter_(self.net, setting, self.optimizer, carry=self.carry, split=split)
        if self.random_init and epoch == 0 and Phase.LOW in phases_of(self.net).values():
            randomize_(self.net)
        if self.transition and self.rewarm and epoch > 0:
            if self._rewarm is not None:
                self._rewarm.stop()
            self._rewarm = rewarm_(self.optimizer, self.rewarm)
        cuts: dict[str, int] = {}
        if self.landing is not None and self.steps:
            cuts = epochs_to_cut(self.schedule, state, phases_of(self.net))
            self.landing.begin({name: count * self.steps for name, count in cuts.items()})
        record = {
            "epoch": epoch,
            "phase": phase_label(self.net),
            "phases": {name: phase.name for name, phase in phases_of(self.net).items()},
            "ranks": {name: modules[0].rank for name, modules in switched_modules(unwrap(self.net)).items()},
            "lr": state.lr,
            "reasons": list(getattr(setting, "reasons", ())),
            "epochs_to_cut": cuts,
            "switch_error": {change.site: change.error for change in self.transition.changes},
            "switch_spectra": _thinned(old, self._spectra(watched)),
            "switch_seconds": time.perf_counter() - started,
            "spent": state.spent + cost_of(self.net),
        }
        self.history.append(record)
        return record

    def _spectra(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The singular values of these sites, largest first."""
        sites = switched_modules(unwrap(self.net))
        return {name: sites[name][0].spectrum().flatten().sort(descending=True).values for name in names}

    def hooks_state(self) -> dict[str, Any]:
        """Where a re-warm-up and a landing stand: plain values and tensors."""
        rewarm = [self._rewarm.steps, self._rewarm.left] if self._rewarm is not None and self._rewarm.left else None
        return {"rewarm": rewarm, "landing": self.landing.state() if self.landing is not None else None}

    def load_hooks_state(self, state: Mapping[str, Any]) -> None:
        """Go on with them from there."""
        if state.get("rewarm"):
            self._rewarm = Rewarm(self.optimizer, *state["rewarm"])
        if self.landing is not None and state.get("landing"):
            self.landing.load(state["landing"])

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs beside the net's and the optimizer's state: plain values and tensors."""
        return {"history": self.history, **self.hooks_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there; ``resume_phases_`` has brought the net into its phases before its weights were loaded."""
        self.history = list(state["history"])
        self.load_hooks_state(state)

    def remove(self) -> None:
        """Take all hooks off the optimizer."""
        self.decay.remove()
        if self.landing is not None:
            self.landing.remove()
        if self._rewarm is not None:
            self._rewarm.stop()


def _thinned(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, list[list[float]]]:
    """Per site both spectra at the same up to 64 indices, evenly spread from first to last; zeros where the smaller one
    has ended.
    """
    found = {}
    for name in before:
        count = max(len(before[name]), len(after[name]))
        step = max(1.0, (count - 1) / (_POINTS - 1))
        chosen = [round(i * step) for i in range(min(count, _POINTS))]
        both = [torch.nn.functional.pad(spectra[name], (0, count - len(spectra[name]))) for spectra in (before, after)]
        found[name] = [[float(f"{value:.4g}") for value in values[chosen].tolist()] for values in both]
    return found


def phase_label(net: nn.Module) -> str:
    """``FULL``, ``LOW``, or how many sites are in which."""
    phases = list(phases_of(net).values())
    counts = [(phase.name, phases.count(phase)) for phase in Phase if phase in phases]
    return counts[0][0] if len(counts) == 1 else " ".join(f"{count} {name}" for name, count in counts)


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
