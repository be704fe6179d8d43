"""How a model is trained: every choice but the schedule, in one frozen value. A new choice is a field here."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from ..aliases import Kwargs
from ..checks import check_compile, check_flags, is_number, is_whole
from ..errors import DynrankError, TransitionError
from ..phases import Carry, checked_carry
from .costs import CostBy, checked_cost_by
from .factor_decay import Decay, checked_decay
from .factor_steps import Steps, checked_steps


@dataclass(frozen=True, kw_only=True)
class PhaseSettings:
    """How phases are entered and left, in any training loop.

    Attributes:
        carry: What becomes of the optimizer's state at a switch.
        rewarm: Over how many steps the learning rate rises again after a switch; 0 for not at all.
        decay: What decays where factors train.
        factor_steps: By how much factors move in a step of the optimizer.
        random_init: Whether factors with which the run begins are random, and not those of the model's weights.
        landing: Whether, before a cut, what it will take away decays to nothing (see ``landing``).
        spectra: Whether spectra are recorded: around the last cut of each site, and effective and stable ranks at the
            end of an epoch.
        cost_by: What the budget of a schedule such as ``auto`` is counted in.

    Raises:
        TransitionError: For a value that is none of these.
        ScheduleError: For a ``cost_by`` that is none.
    """

    carry: Carry = Carry.MOVE
    rewarm: int = 0
    decay: Decay = Decay.EACH
    factor_steps: Steps = Steps.EACH
    random_init: bool = False
    landing: bool = False
    spectra: bool = True
    cost_by: CostBy = CostBy.FLOPS

    def __post_init__(self) -> None:
        checked_carry(self.carry)
        checked_decay(self.decay)
        checked_steps(self.factor_steps)
        checked_cost_by(self.cost_by)
        if not is_whole(self.rewarm):
            raise TransitionError(f"a learning rate cannot re-warm over {self.rewarm!r} steps; give 0 or more")
        flags = {"random_init": self.random_init, "landing": self.landing, "spectra": self.spectra}
        check_flags(TransitionError, **flags)

    @property
    def choices(self) -> Kwargs:
        """These choices by name, for another value that has them."""
        return {each.name: getattr(self, each.name) for each in fields(PhaseSettings)}


@dataclass(frozen=True)
class Settings(PhaseSettings):
    """How ``fit`` trains a run.

    Attributes:
        epochs: How many epochs the run has; None where it is counted in steps.
        steps: Optimizer steps of a run without epochs. It goes through the data as often as that takes, and notes a
            record, with an evaluation, for every twentieth of them.
        device: The device, as torch names it.
        amp: The type to autocast to: ``torch.bfloat16``, ``torch.float16`` (gradients are scaled) or None.
        compile: Whether to compile the net, or the mode of torch.compile to do it in: ``max-autotune-no-cudagraphs``
            tries many kernels for each product, on a GPU.
        activation_memory: How much memory may hold what the backward pass needs of the forward one, from 0 to 1, what
            torch.compile keeps by itself; the rest is computed again. None leaves it to torch.
        dynamic: As in torch.compile; with False every shape has a graph of its own, so that a resumed run repeats the
            very same graphs.
        checkpoint_steps: Save after every so many optimizer steps too, and not only after an epoch.
        accumulate: How many batches make one optimizer step, with the mean of their gradients.
        clip: The largest norm that the gradients of a step may have together; None for any.

    Raises:
        DynrankError: For a value that is none of these.
    """

    epochs: int | None = None
    steps: int | None = None
    device: str = "cpu"
    amp: torch.dtype | None = None
    compile: bool | str = True
    activation_memory: float | None = None
    dynamic: bool | None = False
    checkpoint_steps: int | None = None
    accumulate: int = 1
    clip: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.amp not in (None, torch.bfloat16, torch.float16):
            raise DynrankError(f"amp is {self.amp!r}: give torch.bfloat16, torch.float16, or None for full precision")
        check_compile(DynrankError, self.compile)
        if self.activation_memory is not None:
            if not is_number(self.activation_memory, 0, 1):
                raise DynrankError(f"activation_memory is a share, from 0 to 1, not {self.activation_memory!r}")
            if not self.compile:
                raise DynrankError(
                    "activation_memory is kept to by torch.compile, and compile is False: compile the net, or leave it "
                    "out (torch.utils.checkpoint in the model saves memory eagerly)"
                )
        if not is_whole(self.accumulate, 1):
            raise DynrankError(f"a step of {self.accumulate!r} batches is none: give a whole number of 1 or more")
        if self.clip is not None and (not is_number(self.clip, 0) or self.clip == 0):
            raise DynrankError(f"gradients cannot be clipped to a norm of {self.clip!r}: give a number above 0")
