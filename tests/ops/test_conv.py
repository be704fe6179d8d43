"""Convolutions as ops, against torch's own layers, and the parts that they split into along their axes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from op_cases import CONVS, TRANSPOSED, OpCase, conv, float64, transposed
from torch import Tensor

from dynrank_fx.ops import ConvOp, ConvTransposeOp

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
BOTH = CONVS | TRANSPOSED
by_case = pytest.mark.parametrize("case", BOTH.values(), ids=BOTH)
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")


def torchs(case: OpCase, x: Tensor, W: Tensor, bias: Tensor) -> Tensor:
    """What torch's function of this number of axes gives."""
    op = case.op
    if isinstance(op, ConvTransposeOp):
        settings = (op.stride, op.padding, op.output_padding, op.groups, op.dilation)
        return CONV_TRANSPOSE[len(op.stride)](x, W, bias, *settings)
    assert isinstance(op, ConvOp)
    padded = F.pad(x, op.pad, mode=op.pad_mode) if op.pad else x
    return CONV[len(op.stride)](padded, W, bias, op.stride, op.padding, op.dilation, op.groups)


@by_case
def test_an_op_is_torchs_own_convolution(case: OpCase) -> None:
    channels = case.op.output_shape(case.x, case.weight)[1 - len(case.weight)]
    x, W, bias = float64(case.x), float64(case.weight), float64((channels,))
    assert torch.equal(case.op(x, W, bias), torchs(case, x, W, bias))


@by_case
def test_its_kind_is_the_name_of_torchs_function(case: OpCase) -> None:
    functions = CONV_TRANSPOSE if case.op.spreads else CONV
    assert case.op.kind == functions[len(case.op.stride)].__name__


@by_case
def test_the_gradient_of_the_weight_is_torchs(case: OpCase) -> None:
    channels = case.op.output_shape(case.x, case.weight)[1 - len(case.weight)]
    x, W, bias = float64(case.x), float64(case.weight).requires_grad_(), float64((channels,))
    (got,) = torch.autograd.grad(case.op(x, W, bias).square().sum(), W)
    (expected,) = torch.autograd.grad(torchs(case, x, W, bias).square().sum(), W)
    assert torch.equal(got, expected)


ONE_GROUP = {name: case for name, case in BOTH.items() if case.op.groups == 1}


@pytest.mark.parametrize("case", ONE_GROUP.values(), ids=ONE_GROUP)
def test_a_kernel_that_is_a_product_of_two_is_one_part_after_the_other(case: OpCase) -> None:
    """One along the first axis, and one along the others, which comes first."""
    op, x = case.op, float64(case.x)
    a, b, first_axis, *others = case.weight
    middle = a if op.spreads else b
    along = float64((a, b, first_axis, *[1] * len(others)))
    across = float64((middle, middle, 1, *others))
    W = torch.einsum("jb...,ij...->ib..." if op.spreads else "aj...,jb...->ab...", along, across)
    got = op.on_axes([0])(op.on_axes(range(1, len(op.stride)))(x, across), along)
    torch.testing.assert_close(got, op(x, W))


@by_case
def test_on_all_axes_it_is_itself_and_on_none_a_pointwise_one(case: OpCase) -> None:
    assert case.op.on_axes(range(len(case.op.stride))) == case.op
    x, W = float64(case.x), float64((*case.weight[:2], *[1] * len(case.op.stride)))
    assert torch.equal(case.op.on_axes([])(x, W), case.op.pointwise(x, W))


@by_case
def test_pointwise_mixes_the_channels_of_each_group_and_nothing_else(case: OpCase) -> None:
    g, (a, b, *kernel) = case.op.groups, case.weight
    x, W = float64(case.x), float64((a, b))
    got = case.op.pointwise(x, W.reshape(a, b, *[1] * len(kernel)))
    apart = x.unflatten(-len(kernel) - 1, (g, -1)).movedim(-len(kernel) - 1, -1)
    matrices = W.unflatten(0, (g, -1))
    matrices = matrices if case.op.spreads else matrices.mT
    mixed = torch.einsum("...gzi,gio->...gzo", apart.flatten(-len(kernel) - 1, -2), matrices)
    expected = mixed.unflatten(-2, x.shape[-len(kernel) :]).movedim(-1, -len(kernel) - 1)
    torch.testing.assert_close(got, expected.flatten(-len(kernel) - 2, -len(kernel) - 1))


def test_depthwise_convolves_each_channel_along_the_chosen_axes_alone() -> None:
    op = conv((4, 4, 3, 5), (2, 4, 9, 8), stride=(2, 3), padding=(1, 2), dilation=(2, 1)).op
    assert isinstance(op, ConvOp)
    x, kernel = float64((2, 4, 9, 8)), float64((4, 1, 3, 1))
    got = op.depthwise([0], 4)(x, kernel)
    each = [F.conv2d(x[:, i : i + 1], kernel[i : i + 1], None, (2, 1), (1, 0), (2, 1)) for i in range(4)]
    torch.testing.assert_close(got, torch.cat(each, 1))


def test_padding_that_is_no_zeros_goes_to_its_own_axis() -> None:
    """F.pad counts axes from the last."""
    op = ConvOp((1, 1), (0, 0), (1, 1), pad=(2, 1, 0, 3), pad_mode="replicate")
    assert op.on_axes([0]) == ConvOp((1, 1), (0, 0), (1, 1), pad=(0, 0, 0, 3), pad_mode="replicate")
    assert op.on_axes([1]) == ConvOp((1, 1), (0, 0), (1, 1), pad=(2, 1, 0, 0), pad_mode="replicate")
    assert op.pointwise == ConvOp((1, 1), (0, 0), (1, 1)), "no padding has no mode"


@pytest.mark.parametrize("case", [conv((4, 2, 3), (0, 2, 5)), transposed((2, 4, 3), (0, 2, 5))], ids=["conv", "back"])
def test_a_gradient_of_no_examples_is_zero(case: OpCase) -> None:
    W = float64(case.weight).requires_grad_()
    (gradient,) = torch.autograd.grad(case.op(float64(case.x), W).sum(), W)
    assert not bool(gradient.any())
