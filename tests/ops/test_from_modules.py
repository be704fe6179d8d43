"""Modules read as ops: an op computes what its module does, and what is more than the layer is no op."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from dynrank_fx.ops import OP_MODULES, LinearOp, has_hooks, holds_more, module_op
from dynrank_fx.ops.from_modules import padding, per_axis


class Renamed(nn.Linear):
    """A subclass that changes nothing."""


MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 8), (2, 3, 6)),
    "linear without bias": (lambda: nn.Linear(6, 8, bias=False), (2, 6)),
    "a subclass that changes nothing": (lambda: Renamed(6, 8), (2, 6)),
    "conv1d": (lambda: nn.Conv1d(6, 8, 3, stride=2, padding=1), (2, 6, 9)),
    "conv1d circular, dilated": (lambda: nn.Conv1d(6, 8, 3, padding=2, padding_mode="circular", dilation=2), (2, 6, 9)),
    "conv2d": (lambda: nn.Conv2d(6, 8, (3, 2), stride=(1, 2), padding=(2, 1), dilation=(2, 1)), (2, 6, 7, 6)),
    "conv2d in groups": (lambda: nn.Conv2d(6, 8, 3, groups=2, bias=False), (2, 6, 7, 6)),
    "conv2d depthwise": (lambda: nn.Conv2d(6, 12, 3, groups=6), (2, 6, 7, 6)),
    "conv2d valid": (lambda: nn.Conv2d(6, 8, 3, padding="valid"), (2, 6, 7, 6)),
    "conv2d same": (lambda: nn.Conv2d(6, 8, (3, 4), padding="same", dilation=(2, 1)), (2, 6, 7, 6)),
    "conv2d reflected": (lambda: nn.Conv2d(6, 8, 3, padding=(1, 2), padding_mode="reflect"), (2, 6, 7, 6)),
    "conv2d replicated": (lambda: nn.Conv2d(6, 8, 3, padding=1, padding_mode="replicate", stride=2), (2, 6, 7, 6)),
    "conv2d same, reflected": (lambda: nn.Conv2d(6, 8, (3, 4), padding="same", padding_mode="reflect"), (2, 6, 7, 6)),
    "conv2d around by nothing": (lambda: nn.Conv2d(6, 8, 3, padding_mode="circular"), (2, 6, 7, 6)),
    "conv3d": (lambda: nn.Conv3d(4, 6, (1, 2, 3), padding=(0, 1, 1)), (2, 4, 3, 4, 5)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(6, 8, 3, stride=2, padding=1, output_padding=1), (2, 6, 5)),
    "transposed 2d": (lambda: nn.ConvTranspose2d(6, 8, 3, groups=2, dilation=(1, 2)), (2, 6, 4, 5)),
    "transposed 3d": (lambda: nn.ConvTranspose3d(4, 6, 2, stride=(1, 2, 1), bias=False), (2, 4, 2, 3, 2)),
    "embedding": (lambda: nn.Embedding(9, 4), ()),
    "embedding with padding": (lambda: nn.Embedding(9, 4, padding_idx=-2), ()),
    "embedding by frequency": (lambda: nn.Embedding(9, 4, scale_grad_by_freq=True), ()),
    "embedding with sparse gradients": (lambda: nn.Embedding(9, 4, sparse=True), ()),
}


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", MODULES)
def test_the_op_of_a_module_computes_what_it_does_gradients_included(name: str) -> None:
    make, shape = MODULES[name]
    module = make().double()
    x = torch.randn(shape, dtype=torch.float64) if shape else torch.tensor([[1, 7, 7], [0, 1, 1]])
    op = module_op(module)
    assert op is not None
    assert isinstance(module, OP_MODULES)
    bias = module._parameters.get("bias")
    out, expected = op(x, module.weight, bias), module(x)
    assert torch.equal(out, expected)
    gradients = [torch.autograd.grad(each.square().sum(), module.weight)[0].to_dense() for each in (out, expected)]
    assert torch.equal(*gradients)


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Standardised(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight / weight.norm(), bias)


def replaced() -> nn.Module:
    """A forward of the instance alone, as some wrappers put there."""
    layer = nn.Linear(4, 4)
    forward = layer.forward
    layer.forward = lambda x: 2 * forward(x)  # type: ignore[method-assign]
    return layer


def with_more() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.register_parameter("scale", nn.Parameter(torch.ones(4)))
    return layer


def without_weight() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.weight = None
    return layer


NO_OPS: dict[str, Callable[[], nn.Module]] = {
    "a forward of its own": lambda: Scaled(4, 4),
    "a forward of the instance": replaced,
    "a convolution of its own": lambda: Standardised(4, 4, 3),
    "another parameter": with_more,
    "no weight": without_weight,
    "a computed weight": lambda: parametrizations.weight_norm(nn.Linear(4, 4)),
    "an embedding that writes to its weight": lambda: nn.Embedding(9, 4, max_norm=1.0),
    "a layer that multiplies otherwise": lambda: nn.Bilinear(4, 4, 4),
    "a bag of embeddings": lambda: nn.EmbeddingBag(9, 4),
    "a layer without matrices": lambda: nn.LayerNorm(4),
    "layers": lambda: nn.Sequential(nn.Linear(4, 4)),
}


@pytest.mark.parametrize("name", NO_OPS)
def test_a_module_that_is_more_or_other_than_the_layer_has_no_op(name: str) -> None:
    assert module_op(NO_OPS[name]()) is None


@pytest.mark.parametrize(
    "hook",
    [
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ],
)
def test_a_hook_of_any_kind_is_seen_and_gone_when_it_is_removed(hook: str) -> None:
    layer = nn.Linear(4, 4)
    assert not has_hooks(layer)
    handle = getattr(layer, hook)(lambda *args: None)
    assert has_hooks(layer)
    assert module_op(layer) is None
    handle.remove()
    assert not has_hooks(layer)
    assert module_op(layer) == LinearOp()


def test_more_than_a_weight_and_a_bias_is_any_other_parameter_a_buffer_or_a_module() -> None:
    assert not holds_more(nn.Linear(4, 4))
    assert not holds_more(nn.Embedding(9, 4))
    assert holds_more(with_more())
    buffered, parent = nn.Linear(4, 4), nn.Linear(4, 4)
    buffered.register_buffer("mask", torch.ones(4))
    parent.child = nn.Identity()
    assert holds_more(buffered)
    assert holds_more(parent)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (2, (2, 2)),
        ([3], (3, 3)),
        ((1, 2), (1, 2)),
        ([1, 2], (1, 2)),
        ("valid", (0, 0)),
        ("same", "same"),
    ],
)
def test_padding_is_one_number_an_axis_or_same(value: object, expected: object) -> None:
    assert padding(value, 2) == expected
    if not isinstance(value, str):
        assert per_axis(value, 2) == expected
