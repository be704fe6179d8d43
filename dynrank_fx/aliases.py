"""Names for values that have no narrower type, each with the reason. Elsewhere ``Any`` stands beside a reason of its
own, after ``# Any:``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

Json: TypeAlias = Any
"""A value that was read from JSON: what it is, is looked at where it is used."""

JsonObject: TypeAlias = dict[str, Any]
"""An object of JSON, written by this package or read from a file."""

Args: TypeAlias = tuple[Any, ...]
"""Positional arguments of a call that is passed on (a model, a function of torch, a hook): only what is called knows
what they are."""

Kwargs: TypeAlias = dict[str, Any]
"""Keyword arguments of such a call, or of a constructor, which names the types of each."""

Batch: TypeAlias = Any
"""One item of a user's data: only the user's own functions know what it is."""

Output: TypeAlias = Any
"""What a model returns: torch leaves it open, and types the call of every module as ``Any``."""

StateDict: TypeAlias = dict[str, Any]
"""What a ``state_dict`` gives: torch types it so, for tensors, numbers and nested values are in it under names that
whoever wrote it knows."""

Group: TypeAlias = dict[str, Any]
"""A parameter group of an optimizer, as torch types it: its parameters and settings by name."""

Function: TypeAlias = Callable[..., Any]
"""A function of torch or of a user that is only called, with arguments that are passed on."""
