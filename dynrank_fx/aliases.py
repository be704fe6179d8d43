"""Names for values that have no narrower type, each with the reason.

``Any`` by itself stands where a library leaves a type open: the arguments of a node of a graph, the arguments of a
module's call and of hooks, state dicts (torch), the options of a command (click), the objects of a trainer
(Lightning, transformers).
"""

from __future__ import annotations

from typing import Any, TypeAlias

Json: TypeAlias = Any
"""A value that was read from JSON: what it is, is looked at where it is used."""

JsonObject: TypeAlias = dict[str, Any]
"""An object of JSON, written by this package or read from a file."""

Batch: TypeAlias = Any
"""One item of a user's data: only the user's own functions know what it is."""

Group: TypeAlias = dict[str, Any]
"""A parameter group of an optimizer, as torch types it: its parameters and settings by name."""

Output: TypeAlias = Any
"""What a model returns: torch leaves it open, and types the call of every module as ``Any``."""
