"""A schedule of phases in a Lightning trainer: ``Trainer(callbacks=[PhasesCallback(schedule)])``.

The LightningModule holds the net that ``transform`` made, and optimizes it with one optimizer. Precision and
checkpoints are Lightning's; the state of the phases is in its checkpoints. To go on from one, bring the net into its
phases before: ``resume_from_(net, path)``.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from ..aliases import StateDict
from ..errors import TransitionError
from ..training import Phases, resume_phases_
from .callback import PhasesHolder, net_in

try:
    from lightning.pytorch.callbacks import Callback
except ImportError:
    from pytorch_lightning.callbacks import Callback

Trainer: TypeAlias = Any
"""Lightning's: a type checker cannot know under which of its two names it is installed."""


class PhasesCallback(PhasesHolder, Callback):  # type: ignore[misc,unused-ignore]
    """Enters the phases of a schedule at the start of every epoch, optimizer state along.

    The arguments are those of ``PhasesHolder``.

    Raises:
        TransitionError: When training starts, where the module holds no net of ``transform``, has several optimizers,
            or trains without an end.
    """

    _restored: StateDict | None = None

    def on_train_start(self, trainer: Trainer, pl_module: nn.Module) -> None:
        """Begin: the optimizer exists, and a checkpoint has been restored.

        Args:
            trainer: The Lightning Trainer.
            pl_module: The LightningModule, which holds the net.

        Raises:
            TransitionError: Where the module holds no net of ``transform``, has several optimizers, or trains without
                an end.
        """
        if len(trainer.optimizers) != 1:
            raise TransitionError(
                f"phases need one optimizer over the net, and this module has {len(trainer.optimizers)}"
            )
        if trainer.max_epochs is None or trainer.max_epochs < 0:
            raise TransitionError("a schedule of phases needs an end: give the Trainer max_epochs")
        configs = trainer.lr_scheduler_configs
        every_step = bool(configs) and configs[0].interval == "step"
        steps = trainer.num_training_batches / trainer.accumulate_grad_batches
        self.phases = Phases(
            net_in(pl_module),
            trainer.optimizers[0],
            self.schedule,
            trainer.max_epochs,
            configs[0].scheduler if configs else None,
            steps=math.ceil(steps) if math.isfinite(steps) else None,
            lr_every_step=every_step,
            settings=self.settings,
        )
        if self._restored is not None:
            self.phases.load_state_dict(self._restored)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: nn.Module) -> None:
        """Enter the phases of the epoch.

        Args:
            trainer: The Lightning Trainer.
            pl_module: The LightningModule; ``dynrank/spent`` is logged by it.

        Raises:
            TransitionError: As ``enter_`` does.
        """
        assert self.phases is not None
        self.phases.net.zero_grad()  # Lightning keeps the gradients of a step until the next one
        record = self.phases.begin(trainer.current_epoch)
        pl_module.log("dynrank/spent", record.spent)  # type: ignore[operator]

    def state_dict(self) -> StateDict:
        """What Lightning's checkpoint keeps of the phases.

        Returns:
            Plain values and tensors.
        """
        return self.phases.state_dict() if self.phases is not None else {}

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Take up what a checkpoint kept; it is put into effect when training starts.

        Args:
            state_dict: What ``state_dict`` gave.
        """
        self._restored = state_dict or None


def resume_from_(net: nn.Module, checkpoint: str | Path) -> None:
    """Bring a freshly transformed net into the phases of a Lightning checkpoint, before ``fit(..., ckpt_path=...)``.

    Args:
        net: What ``transform`` made.
        checkpoint: Lightning's checkpoint file.

    Raises:
        TransitionError: For a checkpoint without phases.
        PlanError: For ranks that a site cannot have.
    """
    data = torch.load(checkpoint, map_location="cpu", weights_only=False)
    for name, state in data.get("callbacks", {}).items():
        if name.startswith("PhasesCallback"):
            resume_phases_(net, state)
            return
    raise TransitionError(f"{checkpoint} has no state of a PhasesCallback: it is of a training without phases")
