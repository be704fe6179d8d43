"""The learning rate after a switch: up again from little, within the steps, unseen by schedulers."""

from __future__ import annotations

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ..checks import is_whole
from ..errors import TransitionError
from ..phases import optimizers_in
from .clock import is_nested


class Rewarm:
    """Scales the learning rate from ``1/steps`` to 1 over the next ``steps`` optimizer steps, then leaves it alone.

    The scaling exists only inside ``optimizer.step()``: learning-rate schedulers and logs see the rate they set.
    ``left`` is how many steps remain, for a checkpoint; ``Rewarm(optimizer, steps, left=left)`` goes on from there.

    Args:
        optimizer: The optimizer.
        steps: Over how many steps; 0 to wait for ``restart``.
        left: How many of them remain; by default all.

    Raises:
        TransitionError: For what is no number of steps.
    """

    def __init__(self, optimizer: Optimizer, steps: int, left: int | None = None) -> None:
        if not is_whole(steps):
            raise TransitionError(f"a learning rate cannot re-warm over {steps!r} steps; give 0 or more")
        (self._optimizer,) = optimizers_in((optimizer,))
        self._rates: list[tuple[float | Tensor, float | Tensor]] = []  # of each group, within a step: set, and scaled
        self._pre: RemovableHandle | None = None
        # This one stays until stop(): torch is walking through those that come after a step when it ends, or restarts.
        self._post = self._optimizer.register_step_post_hook(self._after)
        self.restart(steps, left)

    def restart(self, steps: int, left: int | None = None) -> None:
        """Begin anew, or go on from where it stood.

        Args:
            steps: Over how many steps.
            left: How many of them remain; by default all.
        """
        self.steps, self.left = steps, steps if left is None else left
        if self.left > 0 and self._pre is None:
            self._pre = self._optimizer.register_step_pre_hook(self._before)

    def _before(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        if is_nested(optimizer):
            return
        self._restore(optimizer)  # after a step that raised
        factor = (self.steps - self.left + 1) / self.steps
        self._rates = [(group["lr"], group["lr"] * factor) for group in optimizer.param_groups]
        for group, (_, scaled) in zip(optimizer.param_groups, self._rates, strict=True):
            group["lr"] = scaled

    def _after(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        if not self._rates or is_nested(optimizer):
            return
        self._restore(optimizer)
        self.left -= 1
        if self.left <= 0:
            self._end()

    def _restore(self, optimizer: Optimizer) -> None:
        """The rates that were set, unless somebody has set others since."""
        for group, (rate, scaled) in zip(optimizer.param_groups, self._rates, strict=False):
            if group["lr"] is scaled:
                group["lr"] = rate
        self._rates = []

    def _end(self) -> None:
        if self._pre is not None:
            self._pre.remove()
        self._pre, self.left = None, 0

    def stop(self) -> None:
        """Take the scaling off now."""
        self._end()
        self._post.remove()


def rewarm_(optimizer: Optimizer, steps: int) -> Rewarm:
    """Re-warm the learning rate after a switch: linearly from ``1/steps`` of it to all of it.

    The scaling exists only inside ``optimizer.step()``: learning-rate schedulers and logs see the rate they set.

    Args:
        optimizer: The optimizer.
        steps: Over how many of its next steps.

    Returns:
        The hooks, which leave the rate alone at the end; ``stop()`` takes them off at once.

    Raises:
        TransitionError: For what is no number of steps.
    """
    return Rewarm(optimizer, steps)
