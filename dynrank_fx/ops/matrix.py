"""Products with a matrix as ops: linear, matmul, embedding and einsum, on the weight or on a part of it."""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from .op import Op
from .view import WHOLE, Operand, Shape, View


@dataclass(frozen=True)
class ProductOp(Op):
    """A product with a matrix, or with the part of it that ``view`` takes.

    contracts_rows: whether the rows of the weight are summed over, as in ``x @ W``, or its columns, as in ``x @ W.T``.
    """

    view: View = WHOLE

    @property
    @abc.abstractmethod
    def contracts_rows(self) -> bool: ...

    @property
    @abc.abstractmethod
    def first(self) -> ProductOp:
        """The op of the first of two stages, its view apart."""

    @property
    @abc.abstractmethod
    def last(self) -> ProductOp:
        """The op of the second stage, which adds the bias; its view apart."""


@dataclass(frozen=True)
class LinearOp(ProductOp):
    """``x [..., n], weight [m, n] -> [..., m]``."""

    kind = "linear"
    contracts_rows = False

    def __call__(self, x: Operand, weight: Operand, bias: Operand = None, at: Operand = None) -> Operand:
        return F.linear(x, self.view(weight, at), bias)

    @property
    def first(self) -> LinearOp:
        return LinearOp()

    @property
    def last(self) -> LinearOp:
        return LinearOp()

    def output_shape(self, x: Shape, weight: Shape) -> Shape:
        return (*x[:-1], self.view.shape(weight)[0])

    def flops(self, x: Shape, weight: Shape) -> int:
        """Multiplications and additions, two a pair."""
        return 2 * math.prod(x[:-1]) * math.prod(self.view.shape(weight))


@dataclass(frozen=True)
class MatmulOp(ProductOp):
    """``x [..., k, n] @ weight [..., n, m]``, or ``weight @ x`` where weight_first; a bias as in addmm (baddbmm for a
    batched weight, a stack of matrices), ``beta · bias + alpha · product``.
    """

    weight_first: bool = False
    batched: bool = False
    beta: float = 1
    alpha: float = 1

    kind = "matmul"

    def __call__(self, x: Operand, weight: Operand, bias: Operand = None, at: Operand = None) -> Operand:
        W = self.view(weight, at)
        a, b = (W, x) if self.weight_first else (x, W)
        if bias is None:
            return torch.matmul(a, b)
        add = torch.baddbmm if self.batched else torch.addmm
        return add(bias, a, b, beta=self.beta, alpha=self.alpha)

    @property
    def contracts_rows(self) -> bool:
        return not self.weight_first

    @property
    def first(self) -> MatmulOp:
        return MatmulOp(weight_first=self.weight_first, batched=self.batched)

    @property
    def last(self) -> MatmulOp:
        return replace(self, view=WHOLE)

    def output_shape(self, x: Shape, weight: Shape) -> Shape:
        W = self.view.shape(weight)
        W = (*x[:-2], *W[-2:]) if self.view.gathered else W
        a, b = (W, x) if self.weight_first else (x, W)
        batch = torch.broadcast_shapes(a[:-2], b[:-2])
        return (*batch, *a[-2:-1], *(b[-1:] if len(b) > 1 else ()))

    def flops(self, x: Shape, weight: Shape) -> int:
        inner = self.view.shape(weight)[-2 if self.contracts_rows else -1]
        return 2 * math.prod(self.output_shape(x, weight)) * inner


@dataclass(frozen=True)
class EmbeddingOp(ProductOp):
    """``x [...] of row numbers, weight [m, n] -> [..., n]``: reads rows; it multiplies nothing."""

    padding_idx: int | None = None
    scale_grad_by_freq: bool = False
    sparse: bool = False

    kind = "embedding"
    contracts_rows = True

    def __call__(self, x: Operand, weight: Operand, bias: Operand = None, at: Operand = None) -> Operand:
        settings = {"scale_grad_by_freq": self.scale_grad_by_freq, "sparse": self.sparse}
        return F.embedding(x, self.view(weight, at), self.padding_idx, **settings)

    @property
    def first(self) -> EmbeddingOp:
        return replace(self, view=WHOLE)

    @property
    def last(self) -> MatmulOp:
        return MatmulOp()

    def output_shape(self, x: Shape, weight: Shape) -> Shape:
        return (*x, self.view.shape(weight)[1])

    def flops(self, x: Shape, weight: Shape) -> int:
        return 0


@dataclass(frozen=True)
class EinsumOp(Op):
    """A product of one input and the weight in Einstein's notation.

    x, weight, out: the subscripts; "..." may stand in x and out. Axes of the weight are shared (in x and out),
    contracted (in x only) or free (in out only), at least one of each of the last two.
    weight_first: the order in which the model gives the operands.
    """

    x: str
    weight: str
    out: str
    weight_first: bool = False

    kind = "einsum"

    def __call__(self, x: Operand, weight: Operand, bias: Operand = None, at: Operand = None) -> Operand:
        first, second = (self.weight, self.x) if self.weight_first else (self.x, self.weight)
        operands = (weight, x) if self.weight_first else (x, weight)
        return torch.einsum(f"{first},{second}->{self.out}", *operands)

    @property
    def axes(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """The weight's axes as (shared, contracted, free)."""
        numbered = list(enumerate(self.weight))
        return (
            tuple(i for i, c in numbered if c in self.x and c in self.out),
            tuple(i for i, c in numbered if c in self.x and c not in self.out),
            tuple(i for i, c in numbered if c not in self.x),
        )

    def output_shape(self, x: Shape, weight: Shape) -> Shape:
        sizes, more = self._sizes(x, weight)
        head, dots, tail = self.out.partition("...")
        return (*(sizes[c] for c in head), *(more if dots else ()), *(sizes[c] for c in tail))

    def flops(self, x: Shape, weight: Shape) -> int:
        """Multiplications and additions, two a pair: one pair for all indices that there are."""
        sizes, more = self._sizes(x, weight)
        return 2 * math.prod(sizes.values()) * math.prod(more)

    def _sizes(self, x: Shape, weight: Shape) -> tuple[dict[str, int], Shape]:
        """The size of each axis by its letter, and those that the dots stand for; an axis of one is broadcast."""
        before, dots, after = self.x.partition("...")
        mine = dict(zip(before, x, strict=False)) | dict(zip(reversed(after), reversed(x), strict=False))
        sizes = mine | dict(zip(self.weight, weight, strict=True))
        more = x[len(before) : len(x) - len(after)] if dots else ()
        return {c: mine.get(c, 1) if size == 1 else size for c, size in sizes.items()}, more
