"""Nested Python state (optimizers, schedulers, random generators) as JSON plus tensors, and back, without pickle."""

from __future__ import annotations

from collections import Counter
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..aliases import Json
from ..errors import StoreError

Tensors: TypeAlias = dict[str, Tensor]

_PLAIN = (bool, int, float, str, type(None))


def flatten(value: object, name: str) -> tuple[Json, Tensors]:
    """``value`` as JSON, with the tensors it holds apart, under names that start with ``name``.

    Understands what ``state_dict()`` of optimizers and schedulers and the state of random generators are made of:
    None, bool, int, float, str, list, tuple, dict, Counter, tensors and NumPy arrays. Raises StoreError naming
    anything else.
    """
    tensors: Tensors = {}
    return _flatten(value, name, tensors), tensors


def _flatten(value: object, name: str, tensors: Tensors) -> Json:
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, Tensor):
        return {"tensor": _put(value.detach(), name, tensors)}
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return {"array": _put(torch.from_numpy(value.copy()), name, tensors)}
    if isinstance(value, np.generic) and isinstance(value.item(), _PLAIN):
        return value.item()
    if isinstance(value, list | tuple):
        items = [_flatten(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]
        return {"tuple": items} if isinstance(value, tuple) else items
    if isinstance(value, dict):
        # Keys are kept as values: JSON would turn the integer keys of an optimizer into strings.
        items = [[_flatten(k, name, tensors), _flatten(v, f"{name}.{k}", tensors)] for k, v in value.items()]
        return {"counter" if isinstance(value, Counter) else "dict": items}
    raise StoreError(f"{name} is a {type(value).__name__}, which a checkpoint cannot hold without pickle; leave it out")


def _put(tensor: Tensor, name: str, tensors: Tensors) -> str:
    """The name it is stored under: another one where a different path reads alike (the keys 1 and "1")."""
    while name in tensors:
        name += "'"
    tensors[name] = tensor
    return name


def unflatten(tree: Json, tensors: Tensors) -> Any:  # Any: what was flattened
    """The inverse of ``flatten``. Raises StoreError where a tensor is missing."""
    if isinstance(tree, list):
        return [unflatten(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    ((tag, content),) = tree.items()
    if tag in ("tensor", "array"):
        if content not in tensors:
            raise StoreError(f"the checkpoint has no tensor {content!r}: it is incomplete")
        return tensors[content] if tag == "tensor" else tensors[content].numpy()
    if tag == "tuple":
        return tuple(unflatten(item, tensors) for item in content)
    made = {unflatten(k, tensors): unflatten(v, tensors) for k, v in content}
    return Counter(made) if tag == "counter" else made
