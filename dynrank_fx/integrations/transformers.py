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

from ..errors import TransitionError
from ..training import Phases, resume_phases_
from .callback import PhasesHolder, net_in

FILE = "phases.pt"


class PhasesCallback(PhasesHolder, TrainerCallback):
    """Enters the phases of a schedule at the start of every epoch, optimizer state along.

    The arguments are those of ``PhasesHolder``.

    Attributes:
        resume_from: The checkpoint folder that the Trainer goes on from, where it is not in its own output folder.

    Raises:
        TransitionError: When training begins, where the model holds no net of ``transform``.
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
            TransitionError: Where the model holds no net of ``transform``, or a checkpoint lacks the state of the
                phases.
        """
        optimizer, lr_scheduler = kwargs["optimizer"], kwargs["lr_scheduler"]
        epochs = math.ceil(state.num_train_epochs)
        self.phases = Phases(
            net_in(kwargs["model"]),
            getattr(optimizer, "optimizer", optimizer),  # Accelerate wraps torch's own, which has the hooks
            self.schedule,
            epochs,
            getattr(lr_scheduler, "scheduler", lr_scheduler),
            steps=max(1, math.ceil(state.max_steps / epochs)),
            lr_every_step=True,
            settings=self.settings,
        )
        if state.global_step:
            self._restore(args, state)

    def _restore(self, args: TrainingArguments, state: TrainerState) -> None:
        folder = self.resume_from or _checkpoint(args, state)
        file = Path(folder) / FILE
        if not file.exists():
            raise TransitionError(
                f"{file} is missing: give the callback the checkpoint that the Trainer resumes from as its resume_from"
            )
        assert self.phases is not None
        self.phases.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Enter the phases of the epoch.

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
        if epoch == len(self.phases.history) - 1:
            return  # in the midst of an epoch that a checkpoint has begun
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
