"""A schedule of phases in a Lightning trainer: ``Trainer(callbacks=[PhasesCallback(schedule)])``.

The LightningModule holds the net that ``transform`` made, and optimizes it with one optimizer or several. Precision and
checkpoints are Lightning's; the state of the phases is in its checkpoints. To go on from one, bring the net into its
phases before: ``resume_from_(net, path)``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

from torch import nn

from ..aliases import StateDict
from ..checks import checked_path
from ..errors import ScheduleError, TransitionError
from ..training import Clock, Phases, clock_of, resume_phases_
from .callback import PhasesHolder, net_in, read_pickled, refuse_engine

try:
    from lightning.pytorch.callbacks import Callback
except ImportError:
    from pytorch_lightning.callbacks import Callback

Trainer: TypeAlias = Any
"""Lightning's: a type checker cannot know under which of its two names it is installed."""


_PLAIN = "meta.pt"  # in a checkpoint that is a folder: all that is in no parts


def _averages_of(trainer: Trainer) -> list[nn.Module]:
    """The averages that other callbacks keep: WeightAveraging, EMAWeightAveraging, StochasticWeightAveraging."""
    kept = [getattr(callback, "_average_model", None) for callback in trainer.callbacks]
    return [average for average in kept if isinstance(average, nn.Module)]


def _refuse_strategy(trainer: Trainer) -> None:
    """Raise TransitionError for a strategy that phases do not go with, known by its name as it may not be installed."""
    for kind in type(trainer.strategy).__mro__:
        if kind.__name__ in ("FSDPStrategy", "DeepSpeedStrategy", "XLAStrategy"):
            refuse_engine(kind.__name__, 'give the Trainer strategy="ddp", or ModelParallelStrategy for FSDP2')


class PhasesCallback(PhasesHolder, Callback):  # type: ignore[misc,unused-ignore]
    """Enters the phases of a schedule at every tick, optimizer state along.

    Several processes train as one does: ``Trainer(devices=2, strategy="ddp")``, or ``ModelParallelStrategy`` with a
    ``configure_model`` that calls ``fully_shard``.

    A tick is an epoch; where ``max_steps`` ends the training, or it has one epoch, it is a twentieth of the optimizer
    steps, and of up to five epochs a part where the schedule does not count epochs, as ``auto`` does not. Of several
    optimizers each is taken to make a step for a batch, and Lightning counts all of them.

    The arguments are those of ``PhasesHolder``.

    Raises:
        TransitionError: When training starts, where the module holds no net of ``transform``, and for several processes
            that train it by anything but DDP and FSDP2.
        ScheduleError: When training starts, where it has no end.
    """

    _restored: StateDict | None = None
    _logged = 0

    def on_train_start(self, trainer: Trainer, pl_module: nn.Module) -> None:
        """Begin: the optimizer exists, and a checkpoint has been restored.

        Args:
            trainer: The Lightning Trainer.
            pl_module: The LightningModule, which holds the net.

        Raises:
            TransitionError: Where the module holds no net of ``transform``, or for a strategy that phases do not go
                with.
            ScheduleError: Where the training has no end.
        """
        _refuse_strategy(trainer)
        resume = self._restored or self._ended(trainer)
        self.end_earlier()
        configs, clock = trainer.lr_scheduler_configs, self._clock(trainer).divided(self.schedule)
        self.phases = Phases(
            net_in(pl_module),
            trainer.optimizers,
            self.schedule,
            lr_scheduler=configs[0].scheduler if configs else None,
            clock=clock,
            lr_every_step=bool(configs) and configs[0].interval == "step",
            by_itself=not clock.by_epochs,
            resume=resume,
            averages=[*self.averages, *_averages_of(trainer)],
            scaler=getattr(trainer.precision_plugin, "scaler", None),
            settings=self.settings,
        )
        self._restored = None
        self._logged = 0

    def _ended(self, trainer: Trainer) -> StateDict | None:
        """The state of an earlier ``fit``, where Lightning goes on counting from it, as after ``max_epochs`` was set to
        more.
        """
        return self.phases.state_dict() if self.phases is not None and trainer.global_step > 0 else None

    def _clock(self, trainer: Trainer) -> Clock:
        """In epochs where they end the training and are several, in optimizer steps otherwise."""
        batches = trainer.num_training_batches / trainer.accumulate_grad_batches
        per_epoch = math.ceil(batches) if math.isfinite(batches) else None
        most = None if trainer.max_steps < 0 else math.ceil(trainer.max_steps / max(1, len(trainer.optimizers)))
        epochs = None if trainer.max_epochs is None or trainer.max_epochs < 0 else trainer.max_epochs
        if most is not None and (epochs is None or per_epoch is None or most < epochs * per_epoch):
            return replace(clock_of(None, most, self.every), per_epoch=per_epoch)
        if epochs is None:
            raise ScheduleError("a schedule of phases needs an end: give the Trainer max_steps or max_epochs")
        return clock_of(epochs, per_epoch, self.every)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: nn.Module) -> None:
        """Enter the phases of the epoch, where they go by epochs.

        Args:
            trainer: The Lightning Trainer.
            pl_module: The LightningModule; ``dynrank/spent`` is logged by it.

        Raises:
            TransitionError: As ``enter_`` does.
        """
        self._begin(trainer)
        self._log(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: nn.Module, *args: object) -> None:
        """Enter the phases of an epoch that Lightning has not told of.

        It does not where it goes on from a checkpoint of the last step of the epoch before.

        Args:
            trainer: The Lightning Trainer.
            pl_module: The LightningModule, which holds the net.
            *args: What Lightning tells of the batch.

        Raises:
            TransitionError: As ``enter_`` does.
        """
        self._begin(trainer)

    def _begin(self, trainer: Trainer) -> None:
        assert self.phases is not None
        if self.phases.is_due(epoch := trainer.current_epoch):
            self.phases.net.zero_grad()  # Lightning keeps the gradients of a step until the next one
            self.phases.begin(epoch)

    def on_train_batch_end(self, trainer: Trainer, pl_module: nn.Module, *args: object) -> None:
        """Log what the last tick has brought, where phases go by steps.

        Args:
            trainer: The Lightning Trainer.
            pl_module: The LightningModule; ``dynrank/spent`` is logged by it.
            *args: What Lightning tells of the batch.
        """
        self._log(trainer, pl_module)

    def _log(self, trainer: Trainer, pl_module: nn.Module) -> None:
        assert self.phases is not None
        if self.phases.begun > self._logged:
            self._logged = self.phases.begun
            # The same in all processes, but Lightning asks for the mean of what an epoch logs.
            sync = trainer.world_size > 1
            pl_module.log("dynrank/spent", self.history[-1].spent, sync_dist=sync)  # type: ignore[operator]

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

    Nothing in the file is run: it is read as tensors and plain values.

    Args:
        net: What ``transform`` made.
        checkpoint: Lightning's checkpoint: a file, or the folder of one that ``ModelParallelStrategy`` saved in parts.

    Raises:
        StoreError: For what is no such file, for a damaged one, and for one that holds objects which only running code
            would read.
        TransitionError: For a checkpoint without phases.
        PlanError: For ranks that a site cannot have.
    """
    path = checked_path(checkpoint)
    callbacks = read_pickled(path / _PLAIN if path.is_dir() else path).get("callbacks")
    for name, state in callbacks.items() if isinstance(callbacks, Mapping) else ():
        if str(name).startswith("PhasesCallback"):
            resume_phases_(net, state)
            return
    raise TransitionError(f"{checkpoint} has no state of a PhasesCallback: it is of a training without phases")
