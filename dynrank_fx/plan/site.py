"""What is known of a weight: a Site with its uses, or Skipped with the reason as a sentence. Names only."""

from __future__ import annotations

import fnmatch
import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass

from ..aliases import Json, JsonObject
from ..ops import Op, Shape, op_from_json, op_to_json


@dataclass(frozen=True)
class Use:
    """One application of a weight.

    Attributes:
        op: What is computed with it.
        input_shape: The shape of its input on the example; None where that is not known.
    """

    op: Op
    input_shape: Shape | None = None


@dataclass(frozen=True)
class Site:
    """One weight that could be factored, and every use of it. It holds names only: no node and no parameter.

    Attributes:
        name: The first qualified name of the weight in the original model.
        shape: The shape of the weight.
        uses: Every application of it.
        aliases: Its other names, where it is tied.
        reads: How often the model's code reads the dense matrix besides, which then has to be computed from the
            factors.
        by_code: Whether the model's own code applies it, and no graph: a factor that it shares with others is then
            applied for each of them.
    """

    name: str
    shape: Shape
    uses: tuple[Use, ...]
    aliases: tuple[str, ...] = ()
    reads: int = 0
    by_code: bool = False

    @property
    def kind(self) -> str:
        """What kind of op applies it, in a word."""
        return self.uses[0].op.kind

    @property
    def params(self) -> int:
        """How many numbers the weight has."""
        return math.prod(self.shape)

    @property
    def flops(self) -> int | None:
        """FLOPs of all uses on the example inputs, two a multiply-add; None where no example was given."""
        if any(use.input_shape is None for use in self.uses):
            return None
        return sum(use.op.flops(use.input_shape, self.shape) for use in self.uses if use.input_shape is not None)

    def left_dense(self, reason: str) -> Skipped:
        """The same weight, not factored after all."""
        return Skipped(self.name, self.shape, reason, self.aliases)

    def to_json(self) -> JsonObject:
        uses = [{**op_to_json(use.op), "input_shape": use.input_shape} for use in self.uses]
        reads = {"reads": self.reads} if self.reads else {}
        by_code = {"by_code": True} if self.by_code else {}
        return {"name": self.name, "aliases": self.aliases, "shape": self.shape, "uses": uses, **reads, **by_code}

    @classmethod
    def from_json(cls, data: JsonObject) -> Site:
        uses = []
        for use in data["uses"]:
            shape = use["input_shape"]
            op = op_from_json({k: v for k, v in use.items() if k != "input_shape"})
            uses.append(Use(op, None if shape is None else _shape(shape)))
        aliases, reads = tuple(map(_text, data["aliases"])), operator.index(data.get("reads", 0))
        by_code = data.get("by_code", False) is True
        return cls(_text(data["name"]), _shape(data["shape"]), tuple(uses), aliases, reads, by_code)


@dataclass(frozen=True)
class Skipped:
    """A matrix that stays dense, and why.

    Attributes:
        name: The first qualified name of the weight in the original model.
        shape: The shape of the weight.
        reason: Why it stays dense, as a sentence.
        aliases: Its other names, where it is tied.
    """

    name: str
    shape: Shape
    reason: str
    aliases: tuple[str, ...] = ()

    @property
    def params(self) -> int:
        """How many numbers the weight has."""
        return math.prod(self.shape)

    def to_json(self) -> JsonObject:
        return {"name": self.name, "aliases": self.aliases, "shape": self.shape, "reason": self.reason}

    @classmethod
    def from_json(cls, data: JsonObject) -> Skipped:
        aliases = tuple(map(_text, data["aliases"]))
        return cls(_text(data["name"]), _shape(data["shape"]), _text(data["reason"]), aliases)


def _text(value: Json) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _shape(values: Json) -> Shape:
    return tuple(map(operator.index, values))


def matches(site: Site | Skipped, patterns: Iterable[str]) -> bool:
    """Whether a pattern fits the site's name, an alias, or the module that holds it (``fc`` for ``fc.weight``)."""
    return any(fits(name, pattern) for name in (site.name, *site.aliases) for pattern in patterns)


def fits(name: str, pattern: str) -> bool:
    """Whether a pattern fits the name of a weight, or of the module that holds it."""
    return any(fnmatch.fnmatchcase(each, pattern) for each in (name, name.removesuffix(".weight")))
