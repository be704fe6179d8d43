"""What a call of an op reads and gives, as rows of numbers: one row per application of the weight's matrix.

Shapes: g matrices (groups, or a stack), N rows (examples, positions, pixels), n contracted and m output numbers of one
matrix.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..layouts import Layout
from ..ops import ConvolutionOp, EinsumOp, LinearOp, MatmulOp, Op, ProductOp, Shape, View


@dataclass(frozen=True)
class ActivationRows:
    """rows [g', N, k], for the matrices ``which`` (a number, or one per g'; None for all in order) and the numbers from
    ``start`` on.
    """

    rows: Tensor
    which: int | Tensor | None = None
    start: int = 0


def outputs_along_rows(op: Op, layout: Layout) -> bool | None:
    """Whether what the op gives goes along the rows of the layout's matrix view (the left factor is applied last), or
    along its columns; None where the product of two factors cuts neither the outputs nor the inputs alone. Where it
    cuts the inputs, the outputs are those of every position of the kernel by itself.
    """
    if not layout.last_holds_outputs(op) and not layout.first_holds_inputs(op):
        return None
    _, factor = layout.stages(op, 1)[-1]  # the same at any rank
    return factor == 0


def cuts_inputs(op: Op, layout: Layout) -> bool:
    """Whether the layout cuts what the op reads in one place, and not what it gives: a kernel comes after it."""
    return layout.first_holds_inputs(op) and not layout.last_holds_outputs(op)


def has_input_rows(op: Op) -> bool:
    """Whether the op multiplies its input by the matrix as it is: no rows to look up, no kernel to slide."""
    return isinstance(op, LinearOp | MatmulOp | EinsumOp)


def has_output_rows(op: Op, shape: Shape) -> bool:
    """Whether every call gives all outputs of the matrix, so that they can be told apart by their place."""
    if isinstance(op, ProductOp):
        return op.view == View(transposed=op.view.transposed, dtype=op.view.dtype) and len(shape) == 2
    return isinstance(op, ConvolutionOp)


def input_rows(op: Op, x: Tensor, shape: Shape, at: Tensor | None = None) -> ActivationRows:
    """The op's input as rows [g, N, n]. shape: of the weight."""
    if isinstance(op, ConvolutionOp):
        return ActivationRows(_channel_rows(op, x, op.groups))
    if isinstance(op, EinsumOp):
        return ActivationRows(_einsum_rows(op, x))
    assert isinstance(op, LinearOp | MatmulOp)
    view = op.view
    if isinstance(op, MatmulOp) and op.weight_first and x.ndim > 1:
        x = x.mT
    part = view.rows if op.contracts_rows != view.transposed else view.columns
    start = 0 if part is None else part[0]
    if view.gathered:  # at [...], x [..., N, n]: each example's own matrix
        assert at is not None
        at = at.nonzero()[:, 0] if at.dtype is torch.bool else at  # a mask of the stack, which says the same
        rows = x.expand(*at.shape, *x.shape[-2:]).reshape(-1, *x.shape[-2:])
        return ActivationRows(rows, at.reshape(-1), start)
    if view.index is not None:
        return ActivationRows(x.reshape(1, -1, x.shape[-1]), view.index, start)
    return ActivationRows(_stacked(x, shape[:-2]), None, start)


def output_rows(op: Op, y: Tensor, groups: int) -> ActivationRows:
    """What the op gave, without the bias, as rows [g, N, m]."""
    if isinstance(op, ConvolutionOp):
        return ActivationRows(_channel_rows(op, y, groups))
    if isinstance(op, MatmulOp) and op.weight_first and y.ndim > 1:
        y = y.mT
    return ActivationRows(y.reshape(1, -1, y.shape[-1]))


def _channel_rows(op: ConvolutionOp, x: Tensor, groups: int) -> Tensor:
    """[g, N, channels of a group] of what a convolution reads or gives."""
    batched = x if x.ndim == len(op.stride) + 2 else x[None]
    by_group: Tensor = batched.unflatten(1, (groups, -1)).movedim((1, 2), (0, -1))  # [g, batch, *positions, channels]
    return by_group.reshape(groups, -1, by_group.shape[-1])


def _stacked(x: Tensor, stack: Shape) -> Tensor:
    """[g, N, n] of x [..., N, n], of which the axes before the last two are those of the stack, and others before."""
    if not stack:
        return x.reshape(1, -1, x.shape[-1])
    lead = x.shape[: max(0, x.ndim - 2 - len(stack))]
    x = x.expand(*lead, *stack, *x.shape[-2:])
    axes = range(len(lead), len(lead) + len(stack))
    return x.permute(*axes, *range(len(lead)), -2, -1).reshape(math.prod(stack), -1, x.shape[-1])


def _einsum_rows(op: EinsumOp, x: Tensor) -> Tensor:
    """The input of an einsum as [shared, everything else, contracted]."""
    before, _, after = op.x.partition("...")
    place = {c: i for i, c in enumerate(before)} | {c: x.ndim - len(after) + i for i, c in enumerate(after)}
    shared, contracted, _ = ([place.get(op.weight[i]) for i in axes] for axes in op.axes)
    rest = [i for i in range(x.ndim) if i not in shared and i not in contracted]
    sizes = [math.prod(x.shape[i] for i in axes) for axes in (shared, rest, contracted)]  # type: ignore[index,misc]
    return x.permute(*shared, *rest, *contracted).reshape(sizes)  # type: ignore[arg-type]
