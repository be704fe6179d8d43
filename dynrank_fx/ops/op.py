"""What an op is: one operation that a weight can be applied by, as a pure value that applies, and counts."""

from __future__ import annotations

import abc
from dataclasses import dataclass

from .view import Operand, Shape


@dataclass(frozen=True)
class Op(abc.ABC):
    """A frozen value that takes (input, weight, bias, and which matrices of a stack to gather) and holds everything
    else (stride, padding, which part of the weight, ...), so that the same value runs the dense weight, each factor,
    and an ``fx.Proxy`` when a graph is inlined.

    kind: the name of the op in plans, see ``kinds``.
    """

    @property
    @abc.abstractmethod
    def kind(self) -> str:
        """What plans call it."""

    @abc.abstractmethod
    def __call__(self, x: Operand, weight: Operand, bias: Operand = None, at: Operand = None) -> Operand:
        """Apply the weight to ``x``."""

    @abc.abstractmethod
    def output_shape(self, x: Shape, weight: Shape) -> Shape:
        """The shape of what it gives for an input and a weight of these shapes."""

    @abc.abstractmethod
    def flops(self, x: Shape, weight: Shape) -> int:
        """Multiplications and additions, two a pair; what is only read or moved counts nothing."""
