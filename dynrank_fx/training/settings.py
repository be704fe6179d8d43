"""How a model is trained: every choice but the schedule, in one frozen value. A new choice is a field here."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from ..phases import Carry
from .factor_decay import Decay


@dataclass(frozen=True, kw_only=True)
class PhaseSettings:
    """How phases are entered and left, in any training loop."""

    carry: Carry = Carry.MOVE
    """What becomes of the optimizer's state at a switch."""
    rewarm: int = 0
    """Steps of learning-rate re-warm-up after a switch."""
    decay: Decay = Decay.EACH
    """What decays where factors train."""
    random_init: bool = False
    """Factors that training starts with are random."""
    landing: bool = False
    """What a cut will take away decays before it (see ``landing``)."""
    spectra: bool = True
    """Spectra are recorded: around every switch, and effective and stable ranks at the end of an epoch."""

    @property
    def choices(self) -> dict[str, Any]:
        """These choices by name, for another value that has them."""
        return {each.name: getattr(self, each.name) for each in fields(PhaseSettings)}


@dataclass(frozen=True)
class Settings(PhaseSettings):
    """How ``fit`` trains a run."""

    epochs: int
    device: str = "cpu"
    amp: bool = False
    """Autocast to bfloat16."""
    compile: bool = True
    dynamic: bool | None = False
    """As in torch.compile; with False every shape has a graph of its own, so that a resumed run repeats the very same
    graphs.
    """
    checkpoint_steps: int | None = None
    """Save after every so many steps too, not only after an epoch."""
