"""Shapes, and the part of a weight that an op uses: a transpose, a slice, some matrices of a stack."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch

Shape: TypeAlias = tuple[int, ...]

Operand: TypeAlias = Any
"""A tensor, or an ``fx.Proxy`` that stands for one while a graph is inlined: torch types its functions for tensors
alone. None where there is none."""


@dataclass(frozen=True)
class View:
    """The part of a weight [..., m, n] that the model's code takes: ``W[index][rows, columns]``, transposed or not.

    rows, columns: half-open ranges; None for all. index: of the first axis of a weight of three axes. gathered: the
    first axis is indexed by a tensor, given as ``at`` (each example's own matrix, as in a mixture of experts). dtype:
    the type it is cast to.
    """

    rows: tuple[int, int] | None = None
    columns: tuple[int, int] | None = None
    transposed: bool = False
    index: int | None = None
    gathered: bool = False
    dtype: str | None = None

    def __call__(self, weight: Operand, at: Operand = None) -> Operand:
        if self.index is not None:
            weight = weight[self.index]
        if self.gathered:
            weight = weight[at]
        for axis, part in ((-2, self.rows), (-1, self.columns)):
            if part is not None:
                weight = weight.narrow(axis, part[0], part[1] - part[0])
        weight = weight.mT if self.transposed else weight
        return weight if self.dtype is None else weight.to(getattr(torch, self.dtype))

    def shape(self, weight: Shape) -> Shape:
        """The shape of what is taken; where it is gathered, the first axis is as long as the input says."""
        *batch, m, n = weight if self.index is None else weight[1:]
        m, n = (size if part is None else part[1] - part[0] for size, part in ((m, self.rows), (n, self.columns)))
        return (*batch, n, m) if self.transposed else (*batch, m, n)

    def of_left(self) -> View:
        """The same part taken of the left factor, which holds the rows."""
        return replace(self, columns=None)

    def of_right(self) -> View:
        """The same part taken of the right factor, which holds the columns."""
        return replace(self, rows=None)


WHOLE = View()
