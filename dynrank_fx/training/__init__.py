"""Train in phases: in a loop of one's own by ``Phases``, or by the loop of the command line, with runs that resume."""

from .checkpoints import load_checkpoint_, save_checkpoint
from .clock import Clock, clock_of
from .costs import CostBy, check_costs, cost_of, is_timed
from .factor_decay import Decay, decays_in_a_known_way, factor_decay_
from .factor_steps import Steps, factor_steps_
from .facts import train_state
from .loop import clock_for, clock_of_run, fit
from .phases import Phases
from .pilot import Pilot, Trial, pilot
from .presets import Preset, paper_cifar10, paper_cifar100, practical
from .resume import resume_phases_
from .rewarm import rewarm_
from .run import CHECKPOINT, Run, history_in, plan_in, read_run, restore_run_, save_run, weights_in
from .settings import PhaseSettings, Settings
from .sharding import shard_
from .state_tree import flatten, unflatten
from .task import Task, autocast, evaluate
from .watch import Bar, Watcher, Watchers

__all__ = [
    "CHECKPOINT",
    "Bar",
    "Clock",
    "CostBy",
    "Decay",
    "PhaseSettings",
    "Phases",
    "Pilot",
    "Preset",
    "Run",
    "Settings",
    "Steps",
    "Task",
    "Trial",
    "Watcher",
    "Watchers",
    "autocast",
    "check_costs",
    "clock_for",
    "clock_of",
    "clock_of_run",
    "cost_of",
    "decays_in_a_known_way",
    "evaluate",
    "factor_decay_",
    "factor_steps_",
    "fit",
    "flatten",
    "history_in",
    "is_timed",
    "load_checkpoint_",
    "paper_cifar10",
    "paper_cifar100",
    "pilot",
    "plan_in",
    "practical",
    "read_run",
    "restore_run_",
    "resume_phases_",
    "rewarm_",
    "save_checkpoint",
    "save_run",
    "shard_",
    "train_state",
    "unflatten",
    "weights_in",
]
