"""The channel, the input and the spatial layout: their stages, and of which matrix they are the cut."""

from __future__ import annotations

import math
from typing import TypeAlias

import pytest
import torch
import torch.nn.functional as F
from op_cases import CONVS, TRANSPOSED, OpCase, float64

from dynrank_fx.layouts import ChannelLayout, InputLayout, SpatialLayout
from dynrank_fx.ops import LinearOp

Kind: TypeAlias = type[ChannelLayout | InputLayout | SpatialLayout]
BOTH = CONVS | TRANSPOSED
by_case = pytest.mark.parametrize("case", BOTH.values(), ids=BOTH)
by_layout = pytest.mark.parametrize(
    "layout", [ChannelLayout, InputLayout, SpatialLayout], ids=lambda layout: layout.name
)


@by_layout
@by_case
def test_with_groups_every_stage_is_grouped(case: OpCase, layout: Kind) -> None:
    """A dense second stage would mix the groups."""
    stages = layout.for_op(case.op).stages(case.op, 2)
    assert {stage.groups for stage, _ in stages} == {case.op.groups}  # type: ignore[attr-defined]


@by_layout
@by_case
def test_only_convolutions_in_as_many_groups_are_served(case: OpCase, layout: Kind) -> None:
    for other in BOTH.values():
        assert layout.for_op(case.op).serves(other.op) == (other.op.groups == case.op.groups)
    assert not layout.for_op(case.op).serves(LinearOp())


@by_case
def test_of_the_channel_layout_one_stage_is_the_op_and_the_other_pointwise(case: OpCase) -> None:
    """The right factor has the inputs of a convolution, and the outputs of a transposed one."""
    stages = ChannelLayout.for_op(case.op).stages(case.op, 2)
    expected = ((case.op, 1), (case.op.pointwise, 0))
    assert stages == (expected[::-1] if case.op.spreads else expected)
    assert ChannelLayout.for_op(case.op).last_holds_outputs(case.op) is not case.op.spreads
    assert not SpatialLayout.for_op(case.op).last_holds_outputs(case.op)


@by_case
def test_the_input_layout_is_the_channel_one_with_its_stages_changed_about(case: OpCase) -> None:
    stages = InputLayout.for_op(case.op).stages(case.op, 2)
    expected = ((case.op.pointwise, 1), (case.op, 0))
    assert stages == (expected[::-1] if case.op.spreads else expected)
    for one, other in ((ChannelLayout, InputLayout), (InputLayout, ChannelLayout)):
        holds_outputs = one.for_op(case.op).last_holds_outputs(case.op)
        assert holds_outputs is not one.for_op(case.op).first_holds_inputs(case.op)
        assert holds_outputs is other.for_op(case.op).first_holds_inputs(case.op)


def strides(stages: tuple[tuple[object, int], ...]) -> list[tuple[int, ...]]:
    return [stage.stride for stage, _ in stages]  # type: ignore[attr-defined]


def test_of_the_spatial_layout_each_stage_strides_along_its_own_axes() -> None:
    conv, transposed = CONVS["conv2d"].op, TRANSPOSED["transposed 3d"].op
    assert strides(SpatialLayout().stages(conv, 2)) == [(2, 1), (1, 3)]
    assert strides(SpatialLayout().stages(transposed, 2)) == [(1, 2, 2), (1, 1, 1)], "in the other order"


@by_case
def test_the_spectrum_of_the_channel_layout_is_that_of_outputs_by_all_else_in_each_group(case: OpCase) -> None:
    W, g = float64(case.weight), case.op.groups
    s = torch.linalg.svdvals(ChannelLayout(g).to_matrix(W))
    for mine, group in zip(s, W.chunk(g), strict=True):
        torch.testing.assert_close(mine, torch.linalg.svdvals(group.flatten(1)))


@by_case
def test_the_spectrum_of_the_input_layout_is_that_of_inputs_by_all_else_in_each_group(case: OpCase) -> None:
    W, g = float64(case.weight), case.op.groups
    s = torch.linalg.svdvals(InputLayout(g).to_matrix(W))
    for mine, group in zip(s, W.chunk(g), strict=True):
        torch.testing.assert_close(mine, torch.linalg.svdvals(group.transpose(0, 1).flatten(1)))


@by_case
def test_the_spectrum_of_the_spatial_layout_is_that_of_its_first_axis_by_the_others_in_each_group(
    case: OpCase,
) -> None:
    """Rows are outputs by the other axes of the kernel, columns inputs by the first one."""
    W, g = float64(case.weight), case.op.groups
    s = torch.linalg.svdvals(SpatialLayout(g).to_matrix(W))
    for mine, group in zip(s, W.chunk(g), strict=True):
        m, n, k1, *k2 = group.shape
        matrix = torch.einsum("mnab->mban", group.reshape(m, n, k1, math.prod(k2))).reshape(m * math.prod(k2), k1 * n)
        torch.testing.assert_close(mine, torch.linalg.svdvals(matrix))


def test_the_shapes_of_the_table() -> None:
    assert ChannelLayout(2).matrix_shape((12, 4, 3, 5)) == (6, 60)
    assert InputLayout(2).matrix_shape((12, 4, 3, 5)) == (90, 4)
    assert InputLayout().factor_shapes((12, 4, 3, 5), 7) == ((12, 7, 3, 5), (7, 4, 1, 1))
    assert SpatialLayout(2).matrix_shape((12, 4, 3, 5)) == (30, 12)
    assert SpatialLayout().matrix_shape((6, 4, 3, 2, 5)) == (60, 12)
    assert ChannelLayout().factor_shapes((12, 4, 3, 5), 7) == ((12, 7, 1, 1), (7, 4, 3, 5))
    assert SpatialLayout().factor_shapes((12, 4, 3, 5), 7) == ((12, 7, 1, 5), (7, 4, 3, 1))
    assert ChannelLayout(2).params((12, 4, 3, 5), 3) == 12 * 3 + 2 * 3 * 4 * 15


def test_a_depthwise_kernel_has_one_channel_and_as_many_ranks_as_its_axes_allow() -> None:
    assert ChannelLayout(8).max_rank((8, 1, 3, 5)) == 1
    assert SpatialLayout(8).max_rank((8, 1, 3, 5)) == 3


def test_a_separable_kernel_has_rank_one_in_the_spatial_layout() -> None:
    channels, column, row = float64((5, 4)), float64((3,)), float64((4,))
    W = torch.einsum("m,n,h,w->mnhw", channels[:, 0], channels[0], column, row)
    left, right = SpatialLayout().split(W, 1)
    torch.testing.assert_close(SpatialLayout().join((left, right)), W)
    x = float64((2, 4, 6, 7))
    torch.testing.assert_close(F.conv2d(F.conv2d(x, right), left), F.conv2d(x, W))


def test_a_weight_of_low_rank_is_reproduced_in_either_dtype_and_memory_format() -> None:
    layout = ChannelLayout()
    W = layout.join((float64((12, 3, 1, 1)), float64((3, 6, 3, 3))))
    torch.testing.assert_close(layout.join(layout.split(W, 3)), W)
    last = W.to(memory_format=torch.channels_last)
    torch.testing.assert_close(layout.join(layout.split(last, 3)), W)
    left, right = layout.split(W.to(torch.bfloat16), 3)
    assert left.dtype == right.dtype == torch.bfloat16
    kept = layout.join((left.double(), right.double()))
    assert float((kept - W).norm()) <= 3 * torch.finfo(torch.bfloat16).eps * float(W.norm())
