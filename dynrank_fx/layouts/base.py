"""What a layout is: how a weight becomes factors, and the ops that apply them in turn."""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

from torch import Tensor

from ..ops import Op, Shape
from .moments import first_moment, pulled_back, second_moment

Factors: TypeAlias = tuple[Tensor, ...]


@dataclass(frozen=True)
class Layout(abc.ABC):
    """What all layouts share. ``join`` is linear in each factor.

    exact: whether full rank reproduces the weight. factor_names: what the factors are called in the module of a site.
    """

    name: ClassVar[str]
    exact: ClassVar[bool] = True
    factor_names: ClassVar[tuple[str, ...]] = ("left", "right")

    @classmethod
    @abc.abstractmethod
    def for_op(cls, op: Op) -> Layout:
        """The layout of this kind for a weight that the op applies."""

    @abc.abstractmethod
    def serves(self, op: Op) -> bool:
        """Whether the factors can do what the op does with the weight."""

    @abc.abstractmethod
    def matrix_shape(self, weight: Shape) -> tuple[int, int]:
        """Rows and columns of the matrix of one group."""

    @abc.abstractmethod
    def to_matrix(self, weight: Tensor) -> Tensor:
        """The weight as [g, rows, columns], whose singular values are the site's spectrum."""

    @abc.abstractmethod
    def from_matrix(self, matrix: Tensor, weight: Shape) -> Tensor:
        """The inverse of ``to_matrix``."""

    @abc.abstractmethod
    def factor_shapes(self, weight: Shape, rank: int) -> tuple[Shape, ...]:
        """Shapes of the factors."""

    @abc.abstractmethod
    def stages(self, op: Op, rank: int) -> tuple[tuple[Op, int], ...]:
        """(op, index of its factor) in the order they apply, at a rank; the bias goes to the last."""

    def last_holds_outputs(self, op: Op) -> bool:
        """Whether the factor that is applied last has a row or a column for each number that the op gives, and nothing
        else, so that a product of two factors cuts the outputs alone.
        """
        return False

    @abc.abstractmethod
    def split(self, weight: Tensor, rank: int) -> Factors:
        """The best factors of this rank that are known to be found."""

    @abc.abstractmethod
    def followed(self, weight: Tensor, rank: int, last: Factors = ()) -> tuple[Tensor, Factors]:
        """What a cut of the weight (finite, float32 at least) to this rank keeps, and what tells it: orthonormal bases,
        or the factors where not ``exact``.

        last: what told it of the weight some steps ago, to go on from, cheaply and near enough; of another rank, or
        empty, it is found anew.
        """

    @abc.abstractmethod
    def join(self, factors: Factors) -> Tensor:
        """The weight that the factors stand for."""

    def terms(self, weight: Shape, rank: int) -> int:
        """How many products of one number of each factor are added up to one number of the weight."""
        return rank

    def max_rank(self, weight: Shape) -> int:
        """The largest rank; where ``exact``, the one at which the factors reproduce any weight of this shape."""
        return min(self.matrix_shape(weight))

    def params(self, weight: Shape, rank: int) -> int:
        """How many numbers the factors hold."""
        return sum(math.prod(shape) for shape in self.factor_shapes(weight, rank))

    def join_flops(self, weight: Shape, rank: int) -> int:
        """FLOPs of computing the weight from its factors."""
        return 2 * math.prod(weight) * rank

    def flops(self, op: Op, x: Shape, weight: Shape, rank: int, *, last_only: bool = False) -> int:
        """FLOPs of all stages for one input of shape ``x``; of the last alone where another site does the first."""
        shapes, counts = self.factor_shapes(weight, rank), []
        for stage, index in self.stages(op, rank):
            counts.append(stage.flops(x, shapes[index]))
            x = stage.output_shape(x, shapes[index])
        return counts[-1] if last_only else sum(counts)

    def inner(self, one: Factors, other: Factors) -> Tensor:
        """⟨W, W'⟩ of the weights that two sets of factors stand for."""
        return (self.join(one) * self.join(other)).sum()

    def pulled_back(self, factors: Factors, at_weight: Tensor) -> Factors:
        """What a gradient or a moment at the weight is at each of the factors, see ``multilinear``."""
        return pulled_back(self.join, factors, at_weight)

    def first_moment(self, factors: Factors, moments: Factors) -> Tensor:
        """That of the weight which best explains those of the factors."""
        return first_moment(self.join, self.inner, factors, moments)

    def second_moment(self, factors: Factors, moments: Factors) -> Tensor:
        """An estimate of the weight's from those of the factors."""
        weight = tuple(self.join(factors).shape)
        return second_moment(self.join, factors, moments, self.factor_shapes(weight, 1))


def shapes_of(tensors: Factors) -> tuple[Shape, ...]:
    """Their shapes, to compare."""
    return tuple(tuple(each.shape) for each in tensors)
