"""Rows of activations: the matrix that an op's weight is turns what goes in into what comes out, row by row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dynrank_fx.compression.activation_rows import (
    has_input_rows,
    has_output_rows,
    input_rows,
    output_rows,
    outputs_along_rows,
)
from dynrank_fx.layouts import (
    CONV_LAYOUTS,
    ChannelLayout,
    CPLayout,
    EinsumLayout,
    InputLayout,
    LinearLayout,
    TuckerLayout,
)
from dynrank_fx.ops import ConvOp, ConvTransposeOp, EinsumOp, EmbeddingOp, LinearOp, MatmulOp, Op, View

CONV = ConvOp((1, 1), (1, 1), (1, 1))
TRANSPOSED = ConvTransposeOp((1, 1), (1, 1), (0, 0), (1, 1))

# Each with shapes of its input and weight, and the layout of that weight.
PRODUCTS: list[tuple[Op, Any, tuple[int, ...], tuple[int, ...]]] = [
    (LinearOp(), LinearLayout(), (4, 3, 6), (5, 6)),
    (LinearOp(View(transposed=True)), LinearLayout(), (4, 6), (6, 5)),
    (MatmulOp(), LinearLayout(), (4, 3, 6), (6, 5)),
    (MatmulOp(weight_first=True), LinearLayout(), (4, 6, 3), (5, 6)),
    (MatmulOp(batched=True), LinearLayout(), (2, 4, 6), (2, 6, 5)),
    (EinsumOp("bsgi", "gio", "bsgo"), EinsumLayout((0,), (1,), (2,)), (4, 3, 2, 6), (2, 6, 5)),
    (EinsumOp("...i", "oi", "...o"), EinsumLayout((), (1,), (0,)), (4, 3, 6), (5, 6)),
    (EinsumOp("...i", "oi", "...o"), EinsumLayout((), (0,), (1,)), (4, 3, 6), (5, 6)),
]


def sorted_rows(rows: Tensor) -> Tensor:
    """By their first number: their order is free, as only sums over them count."""
    return torch.stack([each[each[:, 0].argsort()] for each in rows])


@pytest.mark.parametrize(("op", "layout", "x", "weight"), PRODUCTS)
def test_rows_of_inputs_times_the_matrix_are_the_outputs(op: Op, layout: Any, x: Any, weight: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, W = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in (x, weight))
    assert has_input_rows(op)
    rows, y = input_rows(op, inputs, weight), op(inputs, W)
    assert (rows.which, rows.start) == (None, 0)
    along = outputs_along_rows(op, layout)
    assert along is not None
    matrix = layout.to_matrix(W)  # [g, rows, columns]
    given = rows.rows @ (matrix.mT if along else matrix)
    assert given.numel() == y.numel()
    torch.testing.assert_close(given.flatten().sort().values, y.flatten().sort().values)
    if has_output_rows(op, weight):
        torch.testing.assert_close(sorted_rows(output_rows(op, y, 1).rows), sorted_rows(given))


def test_a_part_of_a_weight_has_rows_of_a_part_of_its_inputs() -> None:
    """x @ W[2:5]: the numbers of x meet rows 2 to 4."""
    op = MatmulOp(View(rows=(2, 5)))
    found = input_rows(op, torch.randn(7, 3), (6, 4))
    assert (found.start, tuple(found.rows.shape)) == (2, (1, 7, 3))
    assert not has_output_rows(op, (6, 4))


def test_one_matrix_of_a_stack_and_one_for_each_example() -> None:
    fixed = input_rows(MatmulOp(View(index=1)), torch.randn(7, 6), (3, 6, 4))
    assert fixed.which == 1
    at = torch.tensor([2, 0, 2, 1])
    gathered = input_rows(MatmulOp(View(gathered=True)), torch.randn(4, 5, 6), (3, 6, 4), at)
    assert isinstance(gathered.which, Tensor)
    assert torch.equal(gathered.which, at)
    assert gathered.rows.shape == (4, 5, 6)


def test_a_mask_of_a_stack_says_which_of_it_each_input_meets() -> None:
    mask = torch.tensor([True, False, True])
    gathered = input_rows(MatmulOp(View(gathered=True)), torch.randn(5, 6), (3, 6, 4), mask)
    assert isinstance(gathered.which, Tensor)
    assert gathered.which.tolist() == [0, 2]
    assert gathered.rows.shape == (2, 5, 6), "one input for both"


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("batched", [True, False])
def test_rows_of_a_convolutions_outputs_are_its_channels_at_every_place(groups: int, batched: bool) -> None:
    op = ConvOp((1, 1), (1, 1), (1, 1), groups)
    x, W = torch.randn(3, 4, 5, 5), torch.randn(6, 4 // groups, 3, 3)
    y = op(x if batched else x[0], W)
    rows = output_rows(op, y, groups).rows
    channels = y.movedim(-3, 0).reshape(groups, 6 // groups, -1)  # [g, m/g, N]
    torch.testing.assert_close(rows.mT @ rows, channels @ channels.mT, rtol=1e-4, atol=1e-4)


def test_a_look_up_gives_rows_of_its_table() -> None:
    table, ids = torch.randn(9, 4), torch.tensor([[3, 1], [3, 8]])
    op = EmbeddingOp()
    assert not has_input_rows(op)
    assert has_output_rows(op, (9, 4))
    assert torch.equal(output_rows(op, op(ids, table), 1).rows[0], table[[3, 1, 3, 8]])
    assert outputs_along_rows(op, LinearLayout()) is False


@pytest.mark.parametrize("layout", CONV_LAYOUTS)
def test_only_where_the_last_factor_holds_whole_outputs_does_it_cut_them(layout: Any) -> None:
    """The kernel of the last stage says so: 1×1 without a change of what is summed over."""
    for op in (CONV, TRANSPOSED):
        made = layout.for_op(op)
        if not made.serves(op):
            continue
        _, index = made.stages(op, 2)[-1]
        pointwise = all(size == 1 for size in made.factor_shapes((6, 4, 3, 3), 2)[index][2:])
        if layout in (TuckerLayout, CPLayout):
            assert not made.last_holds_outputs(op)  # their other factors are more than one
        else:
            assert (
                made.last_holds_outputs(op)
                == pointwise
                == ((layout, op) in ((ChannelLayout, CONV), (InputLayout, TRANSPOSED)))
            )
