"""A schedule of phases in a Hugging Face Trainer: ``Trainer(..., callbacks=[PhasesCallback(schedule)])``.

The Trainer's model is the net that ``transform`` made, or holds it. The state of the phases is in every checkpoint
folder, as ``phases.pt``. To go on from one, bring the net into its phases before the Trainer is made:
``resume_from_(net, folder)``.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..aliases import StateDict
from ..errors import TransitionError
from ..training import Clock, Phases, clock_of, refuse_processes, resume_phases_
from .callback import PhasesHolder, net_in

FILE = "phases.pt"


class PhasesCallback(PhasesHolder, TrainerCallback):
    """Enters the phases of a schedule, optimizer state along: at the start of every epoch or, where ``max_steps`` is
    given or there is one epoch, at every twentieth of the optimizer steps.

    The arguments are those of ``PhasesHolder``.

    Attributes:
        resume_from: The checkpoint folder that the Trainer goes on from, where it is not in its own output folder.

    Raises:
        TransitionError: When training begins, where the model holds no net of ``transform``, or several processes
            train.
    """

    resume_from: str | Path | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,  # Any: the Trainer's own parts, each of a type of its own
    ) -> None:
        """Begin: the optimizer and the scheduler exist, and a checkpoint has been restored.

        Args:
            args: The TrainingArguments.
            state: The TrainerState.
            control: The TrainerControl.
            **kwargs: What the Trainer tells besides: the model, the optimizer and the scheduler are used.

        Raises:
            TransitionError: Where the model holds no net of ``transform``, a checkpoint lacks the state of the phases,
                or several processes train.
        """
        refuse_processes(args.world_size)
        optimizer, lr_scheduler = kwargs["optimizer"], kwargs["lr_scheduler"]
        clock = self._clock(args, state)
        self.phases = Phases(
            net_in(kwargs["model"]),
            getattr(optimizer, "optimizer", optimizer),  # Accelerate wraps torch's own, which has the hooks
            self.schedule,
            lr_scheduler=getattr(lr_scheduler, "scheduler", lr_scheduler),
            clock=clock,
            lr_every_step=True,
            by_itself=not clock.by_epochs,
            resume=self._saved(args, state) if state.global_step else None,
            settings=self.settings,
        )

    def _clock(self, args: TrainingArguments, state: TrainerState) -> Clock:
        """In epochs where they are given and several, in optimizer steps otherwise: a stream has no epochs."""
        if args.max_steps > 0:
            return clock_of(None, state.max_steps, self.every)
        epochs = math.ceil(state.num_train_epochs)
        return clock_of(epochs, max(1, math.ceil(state.max_steps / epochs)), self.every)

    def _saved(self, args: TrainingArguments, state: TrainerState) -> StateDict:
        """The state of the phases in the checkpoint that the Trainer goes on from."""
        file = Path(self.resume_from or _checkpoint(args, state)) / FILE
        if not file.exists():
            raise TransitionError(
                f"{file} is missing: give the callback the checkpoint that the Trainer resumes from as its resume_from"
            )
        saved: StateDict = torch.load(file, map_location="cpu", weights_only=True)
        return saved

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Enter the phases of the epoch, where they go by epochs.

        Args:
            args: The TrainingArguments.
            state: The TrainerState, which tells the epoch.
            control: The TrainerControl.
            **kwargs: What the Trainer tells besides.

        Raises:
            TransitionError: As ``enter_`` does.
        """
        assert self.phases is not None
        epoch = int(state.epoch or 0)
        if self.phases.clock.by_epochs and epoch >= len(self.phases.history):  # not one that a checkpoint has begun
            self.phases.begin(epoch)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """Write the state of the phases beside the Trainer's checkpoint.

        Args:
            args: The TrainingArguments.
            state: The TrainerState.
            control: The TrainerControl.
            **kwargs: What the Trainer tells besides.
        """
        folder = _checkpoint(args, state)
        if self.phases is not None and folder.is_dir():
            torch.save(self.phases.state_dict(), folder / FILE)


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    """The folder of the Trainer's checkpoint at this step."""
    assert args.output_dir is not None, "the Trainer sets it"
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def resume_from_(net: nn.Module, folder: str | Path) -> None:
    """Bring a freshly transformed net into the phases of a checkpoint folder, before the Trainer is made.

    Args:
        net: What ``transform`` made.
        folder: The Trainer's checkpoint folder.

    Raises:
        TransitionError: For a folder without the state of the phases.
        PlanError: For ranks that a site cannot have.
    """
    file = Path(folder) / FILE
    if not file.exists():
        raise TransitionError(f"{folder} has no {FILE}: it is of a training without phases")
    resume_phases_(net, torch.load(file, map_location="cpu", weights_only=True))
