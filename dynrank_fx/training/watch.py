"""What one sees of a training run: a bar per epoch, and a line that stays."""

from __future__ import annotations

import math
import sys
from typing import Any, TextIO

from torch import Tensor
from tqdm import tqdm

from ..phases import Transition
from ..plan import PlannedSite
from ..rewrite import plan_of
from ..schedules import EpochRecord
from ..text import counted, printable
from .phases import phase_label
from .run import Run


class Watcher:
    """Told what happens in a run; every method does nothing until overridden."""

    def epoch_started(self, run: Run, transition: Transition) -> None:
        """An epoch has begun.

        Args:
            run: The run.
            transition: What became of the sites that changed their phase.
        """

    def step_done(self, run: Run, loss: Tensor, metric: float | Tensor | None) -> None:
        """An optimizer step is done.

        Args:
            run: The run.
            loss: The loss of the batch.
            metric: The metric of the batch, None where there is none.
        """

    def epoch_done(self, run: Run, record: EpochRecord) -> None:
        """An epoch is done.

        Args:
            run: The run.
            record: What is known of the epoch.
        """


class Watchers(Watcher):
    """Several as one."""

    def __init__(self, *watchers: Watcher) -> None:
        self.watchers = watchers

    def epoch_started(self, run: Run, transition: Transition) -> None:
        for watcher in self.watchers:
            watcher.epoch_started(run, transition)

    def step_done(self, run: Run, loss: Tensor, metric: float | Tensor | None) -> None:
        for watcher in self.watchers:
            watcher.step_done(run, loss, metric)

    def epoch_done(self, run: Run, record: EpochRecord) -> None:
        for watcher in self.watchers:
            watcher.epoch_done(run, record)


class Bar(Watcher):
    """A tqdm bar that names epoch, phase, loss, metric and learning rate; on a terminal only, the lines everywhere.

    steps: batches per epoch, None where unknown. metric: what the metric is called. unit: what an epoch is called.
    """

    def __init__(
        self,
        epochs: int,
        steps: int | None,
        metric: str = "metric",
        file: TextIO | None = None,
        *,
        unit: str = "epoch",
    ) -> None:
        self.epochs, self.steps, self.metric, self.file = epochs, steps, metric, file or sys.stderr
        self.unit = unit
        self.bar: Any = None  # Any: a tqdm, which has no types

    def epoch_started(self, run: Run, transition: Transition) -> None:
        if transition:
            for phase in sorted({change.after for change in transition.changes}):
                errors = [change.error for change in transition.changes if change.after is phase]
                many = counted(len(errors), "site enters", "sites enter")
                self._line(f"{many} {phase.name}: {_moved(max(errors))}")

    def step_done(self, run: Run, loss: Tensor, metric: float | Tensor | None) -> None:
        if self.bar is None:
            self.bar = tqdm(
                desc=f"{self.unit} {run.epoch + 1}/{self.epochs} {phase_label(run.net)}",
                total=self.steps,
                initial=run.step - 1,
                leave=False,
                file=self.file,
                disable=None,
                dynamic_ncols=True,
            )
        self.bar.update()
        # Reading a loss waits for the GPU, so not at every step.
        if not self.bar.disable and (run.step % 10 == 0 or run.step == self.steps):
            mean_loss, mean_metric, count = run.totals.tolist()
            shown = {"loss": f"{mean_loss / count:.4f}"}
            if metric is not None:
                shown[self.metric] = f"{mean_metric / count:.2%}"
            self.bar.set_postfix(shown | {"lr": f"{run.optimizer.param_groups[0]['lr']:.3g}"})

    def epoch_done(self, run: Run, record: EpochRecord) -> None:
        self.close()
        parts = [f"{self.unit} {record.epoch + 1:>{len(str(self.epochs))}}/{self.epochs}", f"{record.phase:<4}"]
        parts.append(f"loss {record.loss:.4f}")
        if record.metric is not None:
            parts.append(f"{self.metric} {record.metric:.2%}")
        if record.eval_metric is not None:
            parts.append(f"held out {record.eval_metric:.2%}")
        elif record.eval_loss is not None:
            parts.append(f"held-out loss {record.eval_loss:.4f}")
        if ranks := record.effective_rank.values():
            full = math.fsum(_full_rank(row) for row in plan_of(run.net).sites) / len(ranks)
            parts.append(f"effective rank {math.fsum(ranks) / len(ranks):.1f} of {full:.0f}")
        self._line("  ".join([*parts, f"lr {record.lr:.3g}", f"{record.seconds:.1f} s"]))
        cut = record.truncated
        if cut and cut["eval_loss"] != record.eval_loss:
            held_out = f", held out {cut['eval_metric']:.2%}" if cut["eval_metric"] is not None else ""
            self._line(f"truncated as it is now, the model has a loss of {cut['eval_loss']:.4f}{held_out}")

    def close(self) -> None:
        """Take the bar away, as at the end of an epoch or of a run that was stopped."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _line(self, text: str) -> None:
        tqdm.write(printable(text), file=self.file)


def _moved(error: float) -> str:
    """What a switch does to the weights; a landing leaves a cut next to nothing to take away."""
    if error == 0:
        return "weights unchanged"
    return f"truncation moves the weights by {f'up to {error:.0%}' if error >= 0.01 else 'less than 1%'}"


def _full_rank(row: PlannedSite) -> int:
    """How many singular values the site's weight has, over all its groups."""
    matrix = row.layout.matrix_shape(row.site.shape)
    return row.site.params // math.prod(matrix) * min(matrix)
