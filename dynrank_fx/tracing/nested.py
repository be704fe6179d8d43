"""Values inside of each other: torch's pytree, and every mapping walked as a dict is, such as a tokenizer's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, TypeVar

from torch import Tensor
from torch.utils import _pytree as pytree

_Nested = TypeVar("_Nested")


def as_dicts(values: _Nested) -> _Nested:
    """The same with a dict in the place of every mapping that pytree does not know: torch.export takes no other."""
    dicts: _Nested = pytree.tree_map(
        lambda leaf: as_dicts(dict(leaf)) if isinstance(leaf, Mapping) else leaf,
        values,
    )
    return dicts


def leaves(values: object) -> list[object]:
    """What is no container, in order."""
    return pytree.tree_leaves(as_dicts(values))


# Any: pytree's kinds of keys, dataclasses without a common base
def leaves_with_paths(values: object) -> list[tuple[tuple[Any, ...], object]]:
    """The leaves with the keys that lead to them."""
    return pytree.tree_flatten_with_path(as_dicts(values))[0]


def tensors(values: object) -> list[Tensor]:
    """The tensors, in order."""
    return [leaf for leaf in leaves(values) if isinstance(leaf, Tensor)]


def mapped(function: Callable[[Tensor], object], values: _Nested) -> _Nested:
    """The same with ``function`` of every tensor; mappings stay of their kind, where they can be copied and written."""

    def at(leaf: object) -> object:
        if isinstance(leaf, Mapping):
            return _like(leaf, {key: mapped(function, value) for key, value in leaf.items()})
        return function(leaf) if isinstance(leaf, Tensor) else leaf

    new: _Nested = pytree.tree_map(at, values)
    return new


def _like(mapping: Mapping[object, object], items: dict[object, object]) -> Mapping[object, object]:
    if not isinstance(mapping, MutableMapping):
        return items
    twin = copy.copy(mapping)
    for key, value in items.items():
        before = mapping[key]
        twin[key] = value
        if mapping[key] is not before:  # the copy writes into the original
            mapping[key] = before
            return items
    return twin
