"""Layouts and ops, against torch's own convolutions, torch.linalg and the flop counter."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import dynrank_fx as dr
from dynrank_fx.layouts import ChannelLayout, Layout, SpatialLayout, layout_for, layout_named
from dynrank_fx.ops import ConvOp, ConvTransposeOp, EinsumOp, LinearOp, MatmulOp, Op, View, op_from_json, op_to_json

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(frozen=True)
class Setup:
    """An op with the shapes of a weight and an input that fit it."""

    op: Op
    weight: tuple[int, ...]
    x: tuple[int, ...]


def conv(weight: tuple[int, ...], x: tuple[int, ...], **settings: object) -> Setup:
    dims = len(weight) - 2
    every = {"stride": (1,) * dims, "padding": (0,) * dims, "dilation": (1,) * dims} | settings
    return Setup(ConvOp(**every), weight, x)


def transposed(weight: tuple[int, ...], x: tuple[int, ...], **settings: object) -> Setup:
    dims = len(weight) - 2
    every = {"stride": (1,) * dims, "padding": (0,) * dims, "output_padding": (0,) * dims, "dilation": (1,) * dims}
    return Setup(ConvTransposeOp(**every | settings), weight, x)


CONVS = {
    "conv1d": conv((8, 6, 3), (2, 6, 11), stride=(2,), padding=(1,)),
    "conv1d in groups": conv((12, 4, 3), (2, 8, 13), dilation=(2,), groups=2),
    "conv1d unbatched": conv((8, 6, 3), (6, 11), padding=(2,)),
    "conv2d": conv((10, 6, 3, 5), (2, 6, 9, 8), stride=(2, 3), padding=(1, 2), dilation=(2, 1)),
    "conv2d same": conv((10, 6, 3, 4), (2, 6, 9, 8), padding="same", dilation=(2, 3)),
    "conv2d in groups": conv((12, 2, 3, 3), (2, 8, 9, 8), padding=(1, 1), groups=4),
    "conv2d reflected": conv((10, 6, 3, 5), (2, 6, 9, 8), pad=(2, 1, 0, 2), pad_mode="reflect", stride=(1, 2)),
    "conv2d circular in groups": conv((10, 3, 3, 3), (2, 6, 9, 8), pad=(1, 2, 2, 0), pad_mode="circular", groups=2),
    "conv3d": conv((6, 4, 3, 2, 3), (2, 4, 5, 6, 7), stride=(1, 2, 2), padding=(1, 0, 1)),
    "conv3d in groups": conv((8, 2, 3, 2, 2), (2, 4, 5, 6, 7), groups=2, dilation=(1, 2, 1)),
}
TRANSPOSED = {
    "transposed 1d": transposed((6, 8, 3), (2, 6, 7), stride=(2,), padding=(1,), output_padding=(1,)),
    "transposed 2d": transposed((6, 8, 3, 4), (2, 6, 5, 4), stride=(2, 1), dilation=(1, 2)),
    "transposed 2d in groups": transposed((6, 4, 3, 2), (2, 6, 5, 4), padding=(1, 0), groups=2),
    "transposed 3d": transposed((4, 6, 3, 2, 3), (2, 4, 3, 4, 2), stride=(1, 2, 2), output_padding=(0, 1, 0)),
}
PART = View(rows=(2, 8), columns=(1, 6))
PRODUCTS = {
    "linear": Setup(LinearOp(), (9, 14), (3, 4, 14)),
    "linear by a part": Setup(LinearOp(PART), (9, 14), (3, 4, 5)),
    "linear by a transposed part": Setup(LinearOp(replace(PART, transposed=True)), (9, 14), (3, 4, 6)),
    "matmul": Setup(MatmulOp(), (9, 14), (3, 4, 9)),
    "matmul with the weight first": Setup(MatmulOp(PART, weight_first=True), (9, 14), (3, 5, 4)),
    "matmul of a vector": Setup(MatmulOp(), (9, 14), (9,)),
    "matmul of a stack": Setup(MatmulOp(batched=True), (3, 9, 14), (2, 3, 4, 9)),
    "matmul of one of a stack": Setup(MatmulOp(View(index=1, transposed=True)), (3, 9, 14), (4, 14)),
    "einsum": Setup(EinsumOp("bld", "dhk", "blhk"), (6, 2, 5), (3, 4, 6)),
    "einsum of a stack": Setup(EinsumOp("bhd", "ehd", "bhe"), (5, 2, 6), (3, 2, 6)),
    "einsum with dots": Setup(EinsumOp("...hk", "khd", "...d", weight_first=True), (5, 2, 6), (3, 4, 2, 5)),
}
LAYOUTS = (ChannelLayout, SpatialLayout)
GRID = [pytest.param(layout_for(setup.op), setup, id=name) for name, setup in PRODUCTS.items()] + [
    pytest.param(layout(setup.op.groups), setup, id=f"{name}-{layout.name}")
    for name, setup in (CONVS | TRANSPOSED).items()
    for layout in LAYOUTS
]


def matrices(setup: Setup) -> int:
    """How many matrices the weight is: one a group, one in each place of a stack."""
    if isinstance(setup.op, EinsumOp):
        return math.prod(setup.weight[axis] for axis in setup.op.axes[0])
    return getattr(setup.op, "groups", math.prod(setup.weight[:-2]))


def float64(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def apply(layout: Layout, op: Op, x: Tensor, factors: tuple[Tensor, Tensor]) -> Tensor:
    for stage, index in layout.stages(op, factors[0].shape[-1]):
        x = stage(x, factors[index])
    return x


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize(("layout", "setup"), GRID)
class TestEveryLayout:
    def test_full_rank_reproduces_the_weight(self, layout, setup):
        torch.manual_seed(0)
        W = float64(setup.weight)
        torch.testing.assert_close(layout.join(layout.split(W, layout.max_rank(setup.weight))), W)

    def test_the_error_is_that_of_the_discarded_singular_values_of_its_matrix(self, layout, setup):
        torch.manual_seed(0)
        W = float64(setup.weight)
        s = torch.linalg.svdvals(layout.to_matrix(W))
        assert s.shape == (matrices(setup), layout.max_rank(setup.weight))
        for rank in range(1, s.shape[-1] + 1):
            error = torch.linalg.vector_norm(layout.join(layout.split(W, rank)) - W)
            expected = torch.linalg.vector_norm(s[:, rank:])
            torch.testing.assert_close(error, expected, rtol=1e-9, atol=1e-12)

    def test_the_stages_compute_the_op_on_the_joined_weight(self, layout, setup):
        torch.manual_seed(0)
        x = float64(setup.x)
        factors = layout.split(float64(setup.weight), 2)
        out = setup.op.output_shape(setup.x, setup.weight)
        channels = out[-1] if isinstance(setup.op, LinearOp) else out[1 - len(setup.weight)]
        bias = float64((channels,))
        joined = layout.join(factors)
        torch.testing.assert_close(apply(layout, setup.op, x, factors), setup.op(x, joined))
        if isinstance(setup.op, MatmulOp | EinsumOp):
            return  # their bias broadcasts, or there is none
        *first, (last, index) = layout.stages(setup.op, 2)
        for stage, i in first:
            x_low = stage(x, factors[i])
        torch.testing.assert_close(last(x_low, factors[index], bias), setup.op(x, joined, bias))

    def test_matrix_views_are_inverse_both_ways(self, layout, setup):
        torch.manual_seed(0)
        W, g = float64(setup.weight), matrices(setup)
        matrix = layout.to_matrix(W)
        assert matrix.shape == (g, *layout.matrix_shape(setup.weight))
        assert torch.equal(layout.from_matrix(matrix, setup.weight), W)
        rows, columns = layout.matrix_shape(setup.weight)
        B, A = float64((g, rows, 3)), float64((g, 3, columns))
        factors = layout.from_matrices((B, A), setup.weight)
        assert tuple(tuple(f.shape) for f in factors) == layout.factor_shapes(setup.weight, 3)
        assert layout.weight_shape(*layout.factor_shapes(setup.weight, 3)) == setup.weight
        for got, expected in zip(layout.to_matrices(factors), (B, A), strict=True):
            assert torch.equal(got, expected)
        torch.testing.assert_close(layout.join(factors), layout.from_matrix(B @ A, setup.weight))

    def test_parameters_and_flops_are_what_is_counted(self, layout, setup):
        torch.manual_seed(0)
        x, W = float64(setup.x), float64(setup.weight)
        assert setup.op.output_shape(setup.x, setup.weight) == tuple(setup.op(x, W).shape)
        with FlopCounterMode(display=False) as dense:
            setup.op(x, W)
        assert setup.op.flops(setup.x, setup.weight) == dense.get_total_flops()
        # An einsum over an axis of size 1 is no product to the counter.
        for rank in (2, layout.max_rank(setup.weight), *(() if isinstance(setup.op, EinsumOp) else (1,))):
            factors = layout.split(W, rank)
            with FlopCounterMode(display=False) as low:
                apply(layout, setup.op, x, factors)
            assert layout.flops(setup.op, setup.x, setup.weight, rank) == low.get_total_flops()
            assert layout.params(setup.weight, rank) == sum(factor.numel() for factor in factors)

    def test_names_and_ops_survive_json(self, layout, setup):
        op = op_from_json(json.loads(json.dumps(op_to_json(setup.op))))
        assert op == setup.op
        assert op.kind == setup.op.kind
        assert hash(op) == hash(setup.op)
        assert layout_named(layout.name, setup.op) == layout


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", CONVS)
def test_an_op_is_torchs_own_convolution(name):
    torch.manual_seed(0)
    setup = CONVS[name]
    x, W, b = float64(setup.x), float64(setup.weight), float64(setup.weight[:1])
    op = setup.op
    padded = F.pad(x, op.pad, mode=op.pad_mode) if op.pad else x
    expected = CONV[len(op.stride)](padded, W, b, op.stride, op.padding, op.dilation, op.groups)
    assert torch.equal(op(x, W, b), expected)


@pytest.mark.parametrize("name", CONVS)
def test_with_groups_every_stage_is_grouped(name):
    """A dense second stage would mix the groups."""
    setup = CONVS[name]
    for layout in (ChannelLayout(setup.op.groups), SpatialLayout(setup.op.groups)):
        assert {stage.groups for stage, _ in layout.stages(setup.op, 2)} == {setup.op.groups}


def test_the_matrix_of_the_channel_layout_is_outputs_by_the_rest_and_of_the_spatial_one_splits_the_kernel():
    assert ChannelLayout(2).matrix_shape((12, 4, 3, 5)) == (6, 60)
    assert SpatialLayout(2).matrix_shape((12, 4, 3, 5)) == (30, 12)
    assert SpatialLayout().matrix_shape((6, 4, 3, 2, 5)) == (60, 12)
    assert ChannelLayout().factor_shapes((12, 4, 3, 5), 7) == ((12, 7, 1, 1), (7, 4, 3, 5))
    assert SpatialLayout().factor_shapes((12, 4, 3, 5), 7) == ((12, 7, 1, 5), (7, 4, 3, 1))
    assert ChannelLayout(2).params((12, 4, 3, 5), 3) == 12 * 3 + 2 * 3 * 4 * 15


def test_a_weight_of_low_rank_is_reproduced_in_either_dtype_and_memory_format():
    torch.manual_seed(0)
    layout = ChannelLayout()
    W = layout.join((float64((12, 3, 1, 1)), float64((3, 6, 3, 3))))
    torch.testing.assert_close(layout.join(layout.split(W, 3)), W)
    last = W.to(memory_format=torch.channels_last)
    torch.testing.assert_close(layout.join(layout.split(last, 3)), W)
    half = W.to(torch.bfloat16)
    left, right = layout.split(half, 3)
    assert left.dtype == right.dtype == torch.bfloat16
    error = torch.linalg.vector_norm(layout.join((left.double(), right.double())) - W)
    assert float(error) <= 3 * torch.finfo(torch.bfloat16).eps * math.sqrt(W.square().sum())


def test_an_unknown_layout_is_refused_with_the_known_ones():
    with pytest.raises(
        dr.PlanError, match="no layout 'tensor train'; choose one of linear, einsum, channel, spatial, tucker, cp"
    ):
        layout_named("tensor train", LinearOp())
