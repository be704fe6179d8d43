"""What a layout is: how a weight becomes factors, and the ops that apply them in turn.

Shapes: g groups; m rows, n columns of the matrix of one group; r rank. The table in ``choose`` has those of the
factors.
"""

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
    """How a weight becomes factors and one op becomes several. ``join`` is linear in each factor.

    Attributes:
        name: What a plan calls it.
        exact: Whether factors of full rank reproduce every weight.
        factor_names: What the factors are called in the module of a site, in their order.
    """

    name: ClassVar[str]
    exact: ClassVar[bool] = True
    factor_names: ClassVar[tuple[str, ...]] = ("left", "right")

    @classmethod
    @abc.abstractmethod
    def for_op(cls, op: Op) -> Layout:
        """The layout of this kind for a weight.

        Args:
            op: What applies the weight.

        Returns:
            The layout.
        """

    @abc.abstractmethod
    def serves(self, op: Op) -> bool:
        """Whether the factors can do what an op does with the weight.

        Args:
            op: What applies the weight.

        Returns:
            True where ``stages`` gives ops that compute the same.
        """

    @abc.abstractmethod
    def matrix_shape(self, weight: Shape) -> tuple[int, int]:
        """Rows and columns of the matrix of one group.

        Args:
            weight: The shape of the weight.

        Returns:
            (m, n).
        """

    @abc.abstractmethod
    def to_matrix(self, weight: Tensor) -> Tensor:
        """The weight as the matrices whose singular values are the site's spectrum.

        Args:
            weight: The weight.

        Returns:
            [g, m, n].
        """

    @abc.abstractmethod
    def from_matrix(self, matrix: Tensor, weight: Shape) -> Tensor:
        """The inverse of ``to_matrix``.

        Args:
            matrix: [g, m, n].
            weight: The shape of the weight.

        Returns:
            The weight.
        """

    @abc.abstractmethod
    def factor_shapes(self, weight: Shape, rank: int) -> tuple[Shape, ...]:
        """Shapes of the factors.

        Args:
            weight: The shape of the weight.
            rank: The rank r.

        Returns:
            One shape per factor, in the order of ``factor_names``.
        """

    @abc.abstractmethod
    def stages(self, op: Op, rank: int) -> tuple[tuple[Op, int], ...]:
        """The ops that together do what one op does with the weight.

        Args:
            op: What applies the weight.
            rank: The rank r.

        Returns:
            (op, index of its factor), in the order in which they apply; the bias goes to the last.
        """

    def last_holds_outputs(self, op: Op) -> bool:
        """Whether the factor applied last has a row or a column for each number that the op gives, and nothing besides.

        Only then a cut can keep the outputs of the op, and not only its weight.

        Args:
            op: What applies the weight.

        Returns:
            True where a cut can be calibrated on the outputs.
        """
        return False

    def first_holds_inputs(self, op: Op) -> bool:
        """Whether the factor applied first has a row or a column for each number that the op reads in one place.

        It has nothing besides. Where the last does not hold the outputs, a cut can then keep what comes of the inputs
        that there are.

        Args:
            op: What applies the weight.

        Returns:
            True where a cut can be calibrated on the inputs alone.
        """
        return False

    @abc.abstractmethod
    def split(self, weight: Tensor, rank: int, last: Factors = ()) -> Factors:
        """The best factors that are known to be found: ‖W − join(factors)‖_F is small.

        Args:
            weight: The weight W.
            rank: The rank r.
            last: What ``start`` or ``followed`` gave some steps ago, to begin with where that helps.

        Returns:
            The factors, in the order of ``factor_names``.
        """

    def start(self, factors: Factors) -> Factors:
        """What a later cut of the weight may begin with, while the weight that factors stand for trains on.

        Args:
            factors: The factors, in the order of ``factor_names``.

        Returns:
            For ``last`` of ``split``; empty where a cut begins anew.
        """
        return ()

    @abc.abstractmethod
    def followed(self, weight: Tensor, rank: int, last: Factors = ()) -> tuple[Tensor, Factors]:
        """What a cut of the weight to this rank keeps, while the weight changes little by little.

        Args:
            weight: The weight; finite, of float32 at least.
            rank: The rank r.
            last: The second of the results of some steps ago, to go on from, cheaply and near enough. Of another rank,
                or empty, it is found anew.

        Returns:
            What is kept, in the shape of the weight, and what tells it: orthonormal bases, or the factors where the
                layout is not ``exact``.
        """

    @abc.abstractmethod
    def join(self, factors: Factors) -> Tensor:
        """The weight that factors stand for.

        Args:
            factors: The factors, in the order of ``factor_names``.

        Returns:
            The weight.
        """

    def terms(self, weight: Shape, rank: int) -> int:
        """How many products, of one number of each factor, are added up to one number of the weight.

        Args:
            weight: The shape of the weight.
            rank: The rank r.

        Returns:
            The number; r for two factors.
        """
        return rank

    def max_rank(self, weight: Shape) -> int:
        """The largest rank; where ``exact``, the one at which the factors reproduce any weight of this shape.

        Args:
            weight: The shape of the weight.

        Returns:
            The rank; min(m, n) for two factors.
        """
        return min(self.matrix_shape(weight))

    def params(self, weight: Shape, rank: int) -> int:
        """How many numbers the factors hold.

        Args:
            weight: The shape of the weight.
            rank: The rank r.

        Returns:
            The sum over all factors.
        """
        return sum(math.prod(shape) for shape in self.factor_shapes(weight, rank))

    def join_flops(self, weight: Shape, rank: int) -> int:
        """FLOPs of computing the weight from its factors, two a multiply-add.

        Args:
            weight: The shape of the weight.
            rank: The rank r.

        Returns:
            The FLOPs of one ``join``.
        """
        return 2 * math.prod(weight) * rank

    def flops(self, op: Op, x: Shape, weight: Shape, rank: int, *, last_only: bool = False) -> int:
        """FLOPs of the stages that take the place of one op, two a multiply-add.

        Args:
            op: What applies the weight.
            x: The shape of its input.
            weight: The shape of the weight.
            rank: The rank r.
            last_only: Whether to count the last stage alone, where another site applies the others.

        Returns:
            The FLOPs of one application.
        """
        shapes, counts = self.factor_shapes(weight, rank), []
        for stage, index in self.stages(op, rank):
            counts.append(stage.flops(x, shapes[index]))
            x = stage.output_shape(x, shapes[index])
        return counts[-1] if last_only else sum(counts)

    def inner(self, one: Factors, other: Factors) -> Tensor:
        """The inner product ⟨W, W'⟩ of the weights that two sets of factors stand for.

        Args:
            one: The factors of W.
            other: The factors of W'.

        Returns:
            A tensor of one number.
        """
        return (self.join(one) * self.join(other)).sum()

    def pulled_back(self, factors: Factors, at_weight: Tensor) -> Factors:
        """What a gradient or a first moment at the weight is at each of the factors, by the chain rule.

        Args:
            factors: The factors.
            at_weight: The gradient or moment, in the shape of the weight.

        Returns:
            One tensor per factor, in its shape; for W = B A and G they are G Aᵀ and Bᵀ G.
        """
        return pulled_back(self.join, factors, at_weight)

    def first_moment(self, factors: Factors, moments: Factors) -> Tensor:
        """The first moment of the weight that best explains those of the factors, by least squares.

        Args:
            factors: The factors.
            moments: Their first moments.

        Returns:
            The moment, in the shape of the weight.
        """
        return first_moment(self.join, self.inner, factors, moments)

    def second_moment(self, factors: Factors, moments: Factors) -> Tensor:
        """An estimate of the weight's second moment from those of the factors.

        Args:
            factors: The factors.
            moments: Their second moments.

        Returns:
            The moment, in the shape of the weight.
        """
        weight = tuple(self.join(factors).shape)
        return second_moment(self.join, factors, moments, self.factor_shapes(weight, 1))


def shapes_of(tensors: Factors) -> tuple[Shape, ...]:
    """Their shapes, to compare."""
    return tuple(tuple(each.shape) for each in tensors)
