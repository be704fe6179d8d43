"""The bytes of tensors that are alive at most while something is done, as tests of memory need them."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class Watched(TorchDispatchMode):
    """Counts the storages that operations give within it, on top of what was there before.

    Attributes:
        now: Bytes of those that are alive.
        peak: The most that they came to.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind.__name__ == "DTensor" for kind in types):
            return NotImplemented  # its parts come by again
        inputs = {id(each.untyped_storage()) for each in pytree.tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        given = func(*args, **(kwargs or {}))
        for each in pytree.tree_leaves(given):
            if isinstance(each, Tensor) and id(each.untyped_storage()) not in inputs:
                self._note(each.untyped_storage())
        return given

    def _note(self, storage: Any) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._known and self._known[key]() is storage:
            return

        def gone(_: object) -> None:
            self.now -= size

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)
