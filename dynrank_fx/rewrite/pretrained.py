"""``save_pretrained`` says so when ``from_pretrained`` could not read what it writes.

Hugging Face's ``from_pretrained`` makes a model of the class by its config, which has every weight under its own name.
Where a file has factors in the place of a weight, it fills that with random values.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from ..aliases import Output
from ..errors import DynrankWarning
from .switched import Switched

_NAME = "save_pretrained"


@dataclass(eq=False)
class Pretrained:
    """In the place of a model's ``save_pretrained``, which it calls.

    weights: the names that the sites' weights have in a dense state of the model. expected: whether factors are to be
    written without a word, as into the checkpoints of a training that goes on from them.
    """

    model: nn.Module
    weights: tuple[str, ...]
    expected: bool = False

    def __call__(self, *args: Any, **kwargs: Any) -> Output:  # Any: those of the model's own method
        given = kwargs.get("state_dict")
        state = self.model.state_dict() if given is None else given
        missing = [name for name in self.weights if name not in state]
        if missing and not self.expected:
            names = f"{missing[0]}{f' and {len(missing) - 1} more' if missing[1:] else ''}"
            remedy = (
                "call enter_(net, Phase.FULL) first, or keep the net by dr.save"
                if self._has_sites()
                else "keep the model by torch.save(model, path)"
            )
            warnings.warn(
                f"{_NAME} writes factors in the place of {names}, which from_pretrained fills with random values: "
                f"{remedy}",
                DynrankWarning,
                stacklevel=2,
            )
        return getattr(type(self.model), _NAME)(self.model, *args, **kwargs)

    def _has_sites(self) -> bool:
        return any(isinstance(module, Switched) for module in self.model.modules())

    def __deepcopy__(self, memo: dict[int, object]) -> Pretrained:
        return Pretrained(copy.deepcopy(self.model, memo), self.weights)

    def __reduce__(self) -> tuple[object, ...]:
        if self._has_sites():
            return Pretrained, (self.model, self.weights)
        return partial, (
            getattr(type(self.model), _NAME),
            self.model,
        )  # a truncated model needs nothing of this package


def watch_pretrained_(net: nn.Module, weights: Sequence[str]) -> None:
    """From now on ``save_pretrained`` of the net, and of its parts, says when one of these weights is not written."""
    for path, module in net.named_modules():
        if not callable(getattr(type(module), _NAME, None)):
            continue
        before = vars(module).get(_NAME)
        if before is not None and not isinstance(before, Pretrained):
            continue  # the user has put something of their own there
        prefix = f"{path}." if path else ""
        names = [name.removeprefix(prefix) for name in weights if name.startswith(prefix)]
        known = before.weights if before is not None else ()
        vars(module)[_NAME] = Pretrained(module, tuple(dict.fromkeys((*known, *names))))


def expect_factors_(net: nn.Module, expected: bool) -> None:
    """Whether factors are to be written without a word from now on."""
    for module in net.modules():
        watched = vars(module).get(_NAME)
        if isinstance(watched, Pretrained):
            watched.expected = expected
