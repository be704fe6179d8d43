"""A run's records in TensorBoard: scalars by epoch, and every site's ranks."""

from __future__ import annotations

from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from ..phase import Phase
from ..schedules import EpochRecord
from ..training import Run, Watcher

_SCALARS = ("loss", "metric", "eval_loss", "eval_metric", "lr", "spent", "spent_time", "step_seconds")
_BY_SITE = ("effective_rank", "stable_rank", "switch_error", "ranks")


class TensorBoard(Watcher):
    """Writes what each epoch's record says to an event file: scalars by epoch, and the ranks of every site.

    Args:
        folder: Where the event file is written.
    """

    def __init__(self, folder: str | Path) -> None:
        self.writer = SummaryWriter(str(folder))

    def epoch_done(self, run: Run, record: EpochRecord) -> None:
        """Write the record of an epoch.

        Args:
            run: The run.
            record: What is known of the epoch.
        """
        epoch = record.epoch + 1
        for name in _SCALARS:
            if record[name] is not None:
                self.writer.add_scalar(name, record[name], epoch)
        for name in _BY_SITE:
            for site, value in record[name].items():
                self.writer.add_scalar(f"{name}/{site}", value, epoch)
        phases = list(record.phases.values())
        self.writer.add_scalar("share of sites in FULL", phases.count(Phase.FULL) / max(len(phases), 1), epoch)
        for what, count in record.memory.items():
            self.writer.add_scalar(f"memory/{what}", count, epoch)
        if record.reasons:
            self.writer.add_text("decisions", "  \n".join(record.reasons), epoch)
        self.writer.flush()
