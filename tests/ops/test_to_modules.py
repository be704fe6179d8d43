"""Ops as torch's own layers: a layer computes what its op does, holds what it was given, and reads back as the op."""

from __future__ import annotations

import pytest
import torch
from op_cases import OP_CASES, float64
from torch import nn

from dynrank_fx.ops import EmbeddingOp, LinearOp, MatmulOp, keeps_weight, layer_of, module_op

WITHOUT = {name for name, case in OP_CASES.items() if getattr(case.op, "pad", ()) or case.op.kind == "einsum"} | {
    name
    for name, case in OP_CASES.items()
    if any(word in name for word in ("part", "stack", "gathered", "first", "of the transpose"))
}


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", sorted(OP_CASES.keys() - WITHOUT))
@pytest.mark.parametrize("biased", [False, True])
def test_a_layer_computes_what_its_op_does_and_reads_back_as_it(name: str, biased: bool) -> None:
    case = OP_CASES[name]
    weight, x = nn.Parameter(float64(case.weight)), case.inputs()
    out = case.op.output_shape(tuple(x.shape), case.weight)
    count = out[-1] if isinstance(case.op, LinearOp | MatmulOp) else out[-len(case.weight) + 1]
    bias = nn.Parameter(float64((count,))) if biased else None
    layer = layer_of(case.op, weight, bias)
    if isinstance(case.op, EmbeddingOp) and biased:
        assert layer is None
        return
    assert layer is not None
    assert type(layer).__module__.startswith("torch.nn.modules")
    assert all(p.device.type == "cpu" for p in layer.parameters())
    assert layer._parameters.get("bias") is bias
    expected = case.op(x, weight) if bias is None or not isinstance(case.op, MatmulOp) else x @ weight + bias
    if bias is not None and not isinstance(case.op, MatmulOp):
        expected = case.op(x, weight, bias)
    torch.testing.assert_close(layer(x), expected)
    if keeps_weight(case.op):
        assert layer.weight is weight
        assert module_op(layer) == case.op
    else:
        assert torch.equal(layer.weight, weight.mT)
        assert layer.weight.is_contiguous()


@pytest.mark.parametrize("name", sorted(WITHOUT))
def test_what_torch_has_no_layer_for_is_none(name: str) -> None:
    case = OP_CASES[name]
    assert layer_of(case.op, nn.Parameter(float64(case.weight)), None) is None


def test_a_layer_trains_what_its_weight_trained() -> None:
    frozen = nn.Parameter(torch.randn(4, 3), requires_grad=False)
    for op in (LinearOp(), MatmulOp()):
        layer = layer_of(op, frozen, None)
        assert layer is not None
        assert [p.requires_grad for p in layer.parameters()] == [False]
    scaled = MatmulOp(alpha=2.0)
    assert layer_of(scaled, frozen, None) is None
