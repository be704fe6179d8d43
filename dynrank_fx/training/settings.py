"""How a model is trained: every choice but the schedule's, in one frozen value."""

from __future__ import annotations

from dataclasses import dataclass

from ..phases import Carry
from .factor_decay import Decay


@dataclass(frozen=True)
class Settings:
    """How it is trained. amp: autocast to bfloat16. dynamic: as in torch.compile; with False every shape has a graph
    of its own, so that a resumed run repeats the very same graphs. rewarm: steps of learning-rate re-warm-up after a
    switch. decay: what decays where factors train. random_init: factors that training starts with are random.
    landing: what a cut will take away decays before it (see ``landing``).
    """

    epochs: int
    device: str = "cpu"
    amp: bool = False
    compile: bool = True
    dynamic: bool | None = False
    carry: Carry = Carry.MOVE
    rewarm: int = 0
    decay: Decay = Decay.EACH
    random_init: bool = False
    landing: bool = False
    checkpoint_steps: int | None = None
    spectra: bool = True
