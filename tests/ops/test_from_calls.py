"""Calls of a graph read as ops, under torch.fx and torch.export: each op computes what its call does."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from dynrank_fx.ops import WHOLE, Call, EmbeddingOp, View, call_of

TOKENS = torch.tensor([[1, 7, 7], [0, 1, 5]])
# A function of an input x, a weight w and a bias b; the shapes of all three.
Case = tuple[Callable[[Tensor, Tensor, Tensor], Tensor], tuple[int, ...] | Tensor, tuple[int, ...], tuple[int, ...]]
CALLS: dict[str, Case] = {
    "linear": (lambda x, w, b: F.linear(x, w, b), (2, 3, 6), (8, 6), (8,)),
    "linear without bias": (lambda x, w, b: F.linear(x, w) + b, (2, 6), (8, 6), (8,)),
    "linear by names": (lambda x, w, b: F.linear(bias=b, weight=w, input=x), (2, 6), (8, 6), (8,)),
    "@": (lambda x, w, b: x @ w + b, (2, 3, 6), (6, 8), (8,)),
    "@ with the weight first": (lambda x, w, b: w @ x + b, (2, 6, 3), (8, 6), (3,)),
    "@ of a vector": (lambda x, w, b: x @ w + b, (6,), (6, 8), (8,)),
    "matmul": (lambda x, w, b: torch.matmul(x, w) + b, (2, 6), (6, 8), (8,)),
    "matmul by names": (lambda x, w, b: torch.matmul(other=w, input=x) + b, (2, 6), (6, 8), (8,)),
    "mm": (lambda x, w, b: torch.mm(x, w) + b, (2, 6), (6, 8), (8,)),
    "mm by a name": (lambda x, w, b: x.mm(mat2=w) + b, (2, 6), (6, 8), (8,)),
    "a method": (lambda x, w, b: x.matmul(w) + b, (2, 6), (6, 8), (8,)),
    "a method of the weight": (lambda x, w, b: w.mm(x) + b, (6, 2), (8, 6), (2,)),
    "bmm": (lambda x, w, b: torch.bmm(x, w) + b, (3, 2, 6), (3, 6, 8), (8,)),
    "addmm": (lambda x, w, b: torch.addmm(b, x, w), (2, 6), (6, 8), (8,)),
    "addmm, scaled": (lambda x, w, b: torch.addmm(b, x, w, beta=0.5, alpha=2), (2, 6), (6, 8), (8,)),
    "addmm with the weight first": (lambda x, w, b: torch.addmm(b, mat2=x, mat1=w), (6, 2), (8, 6), (2,)),
    "a method of the bias": (lambda x, w, b: b.addmm(x, w, alpha=3), (2, 6), (6, 8), (8,)),
    "baddbmm": (lambda x, w, b: torch.baddbmm(b, x, w, beta=2), (3, 2, 6), (3, 6, 8), (3, 1, 8)),
    "einsum": (lambda x, w, b: torch.einsum("bd,dhk->bhk", x, w) + b, (2, 6), (6, 2, 4), (4,)),
    "einsum with spaces": (lambda x, w, b: torch.einsum("b d, e d -> b e", x, w) + b, (2, 6), (8, 6), (8,)),
    "einsum with dots": (lambda x, w, b: torch.einsum("...d,ed->...e", x, w) + b, (2, 3, 6), (8, 6), (8,)),
    "einsum with the weight first": (lambda x, w, b: torch.einsum("ed,bd->be", w, x) + b, (2, 6), (8, 6), (8,)),
    "einsum of a list": (lambda x, w, b: torch.einsum("bhd,hde->bhe", [x, w]) + b, (2, 3, 6), (3, 6, 4), (4,)),
    "embedding": (lambda x, w, b: F.embedding(x, w) + b, TOKENS, (9, 4), (4,)),
    "embedding with padding": (lambda x, w, b: F.embedding(x, w, padding_idx=7) + b, TOKENS, (9, 4), (4,)),
    "embedding with padding from the end": (lambda x, w, b: F.embedding(x, w, -2) + b, TOKENS, (9, 4), (4,)),
    "embedding by frequency": (
        lambda x, w, b: F.embedding(input=x, weight=w, scale_grad_by_freq=True) + b,
        TOKENS,
        (9, 4),
        (4,),
    ),
    "torch.embedding": (lambda x, w, b: torch.embedding(w, x, 7) + b, TOKENS, (9, 4), (4,)),
    "conv1d": (lambda x, w, b: F.conv1d(x, w, b, 2, 1), (2, 6, 9), (8, 6, 3), (8,)),
    "conv1d same": (lambda x, w, b: F.conv1d(x, w, b, padding="same"), (2, 6, 9), (8, 6, 3), (8,)),
    "conv2d": (
        lambda x, w, b: F.conv2d(x, w, b, (1, 2), (2, 0), (2, 1), groups=2),
        (2, 6, 7, 8),
        (8, 3, 3, 2),
        (8,),
    ),
    "conv2d by names": (
        lambda x, w, b: F.conv2d(bias=b, input=x, weight=w, padding=(1, 0), dilation=2),
        (2, 6, 7, 8),
        (8, 6, 3, 2),
        (8,),
    ),
    "conv2d valid": (lambda x, w, b: F.conv2d(x, w, b, padding="valid"), (2, 6, 7, 8), (8, 6, 3, 2), (8,)),
    "conv2d depthwise": (lambda x, w, b: F.conv2d(x, w, b, groups=6), (2, 6, 7, 8), (6, 1, 3, 2), (6,)),
    "conv3d": (lambda x, w, b: F.conv3d(x, w, b, [1, 2, 1]), (2, 4, 3, 4, 5), (6, 4, 2, 2, 3), (6,)),
    "transposed 1d": (lambda x, w, b: F.conv_transpose1d(x, w, b, 2, 1, 1), (2, 6, 5), (6, 8, 3), (8,)),
    "transposed 2d": (
        lambda x, w, b: F.conv_transpose2d(x, w, b, stride=(2, 1), groups=2, dilation=(1, 2)),
        (2, 6, 4, 5),
        (6, 4, 3, 2),
        (8,),
    ),
    "transposed 3d": (lambda x, w, b: F.conv_transpose3d(x, w, b), (2, 4, 2, 3, 2), (4, 6, 2, 2, 2), (6,)),
}
OTHERS: dict[str, Case] = {
    "a dot product": (lambda x, w, b: F.linear(x, w) + b.sum(), (2, 6), (6,), (1,)),
    "the weight as input": (lambda x, w, b: F.linear(w, x) + b, (2, 6), (8, 6), (2,)),
    "the weight twice": (lambda x, w, b: w @ w + x + b, (6,), (6, 6), (6,)),
    "the weight as bias": (lambda x, w, b: torch.addmm(w, x, b), (2, 6), (2, 4), (6, 4)),
    "a sum": (lambda x, w, b: x + w + b, (6,), (8, 6), (6,)),
    "an einsum that sums the weight": (lambda x, w, b: torch.einsum("bd,edk->bk", x, w) + b, (2, 6), (3, 6, 4), (4,)),
    "an einsum that sums the input": (lambda x, w, b: torch.einsum("bcd,de->be", x, w) + b, (2, 3, 6), (6, 4), (4,)),
    "an einsum that sums over dots": (lambda x, w, b: torch.einsum("...d,de->e", x, w) + b, (2, 3, 6), (6, 4), (4,)),
    "an einsum along a diagonal": (lambda x, w, b: torch.einsum("bd,dde->be", x, w) + b, (2, 6), (6, 6, 4), (4,)),
    "an einsum without an arrow": (lambda x, w, b: torch.einsum("bd,de", x, w) + b, (2, 6), (6, 4), (4,)),
    "an einsum with dots in it": (
        lambda x, w, b: torch.einsum("bd,d...->b...", x, w) + b,
        (2, 6),
        (6, 4),
        (4,),
    ),
    "an einsum of three": (lambda x, w, b: torch.einsum("bd,de,e->be", x, w, b), (2, 6), (6, 4), (4,)),
    "an outer product": (lambda x, w, b: torch.einsum("b,de->bde", x, w) + b, (2,), (6, 4), (4,)),
    "an einsum that scales": (lambda x, w, b: torch.einsum("bd,hd->bhd", x, w) + b, (2, 6), (3, 6), (6,)),
}
EVERY = CALLS | OTHERS


def tensors(name: str) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, *others = EVERY[name][1:]
    draw = functools.partial(torch.randn, dtype=torch.float64, generator=generator)
    return (x if isinstance(x, Tensor) else draw(x)), draw(others[0]), draw(others[1])  # type: ignore[arg-type]


class Calls(nn.Module):
    """Makes every call, so that one capture serves all tests."""

    def forward(self, given: list[tuple[Tensor, Tensor, Tensor]]) -> list[Tensor]:
        return [function(*each) for (function, *_), each in zip(EVERY.values(), given, strict=True)]


@functools.cache
def exported() -> tuple[fx.GraphModule, dict[fx.Node, Any]]:
    """The graph of every call by torch.export, and what its nodes give."""
    given = [tensors(name) for name in EVERY]
    module = torch.export.export(Calls(), (given,), strict=False).graph_module
    running = fx.Interpreter(module, garbage_collect_values=False)
    running.run(*[tensor for each in given for tensor in each])
    return module, running.env


def read(name: str, how: str) -> tuple[list[Call], Callable[[Any], Any]]:
    """The calls that are found on the weight, and what gives the value of an operand."""
    place = list(EVERY).index(name)
    if how == "torch.export":
        module, values = exported()
        weight = [node for node in module.graph.nodes if node.op == "placeholder"][3 * place + 1]
    else:
        module = fx.symbolic_trace(EVERY[name][0])
        weight = [node for node in module.graph.nodes if node.op == "placeholder"][1]
        running = fx.Interpreter(module, garbage_collect_values=False)
        running.run(*tensors(name))
        values = running.env
    calls = [call_of(user, weight, WHOLE, EVERY[name][2]) for user in weight.users]
    return [call for call in calls if call is not None], lambda node: node if node is None else values[node]


both = pytest.mark.parametrize("how", ["torch.fx", "torch.export"])


@both
@pytest.mark.parametrize("name", CALLS)
def test_the_op_of_a_call_computes_what_it_does_gradients_included(name: str, how: str) -> None:
    (call,), value = read(name, how)
    x, w, b = tensors(name)
    w.requires_grad_()
    expected = EVERY[name][0](x, w, b)
    got = call.op(value(call.x), w, value(call.bias))
    got = got if call.bias is not None else got + b
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(each.square().sum(), w)[0] for each in (got, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


@both
@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_product_of_an_input_with_the_weight_is_no_call(name: str, how: str) -> None:
    assert read(name, how)[0] == []


def one_call(function: Callable[..., Tensor], shape: tuple[int, ...], view: View = WHOLE) -> Call | None:
    graph = fx.symbolic_trace(function).graph
    (weight,) = [node for node in graph.nodes if node.name == "w"]
    (user,) = weight.users
    return call_of(user, weight, view, shape)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w: F.conv2d(x, w, stride=x.size(0)),
        lambda x, w: F.conv2d(x, w, padding=(x.size(0), 1)),
        lambda x, w: F.conv_transpose2d(x, w, output_padding=x.size(0)),
        lambda x, w: torch.addmm(x, x, w, alpha=x.size(0)),
    ],
)
def test_settings_that_depend_on_the_input_are_no_op(function: Callable[..., Tensor]) -> None:
    assert one_call(function, (8, 8, 3, 3)) is None


def test_an_embedding_that_writes_to_its_weight_is_no_op() -> None:
    assert one_call(lambda x, w: F.embedding(x, w, max_norm=1.0), (9, 4)) is None
    found = one_call(lambda x, w: F.embedding(x, w, padding_idx=-1), (9, 4))
    assert found is not None
    assert found.op == EmbeddingOp(padding_idx=8)


def test_products_take_a_part_of_a_weight_and_convolutions_and_einsums_all_of_it() -> None:
    part = View(rows=(0, 4))
    for function in (lambda x, w: x @ w, lambda x, w: F.linear(x, w), lambda x, w: F.embedding(x, w)):
        call = one_call(function, (4, 8), part)
        assert call is not None
        assert call.op.view == part  # type: ignore[attr-defined]
    assert one_call(lambda x, w: torch.einsum("bd,de->be", x, w), (4, 8), part) is None
    assert one_call(lambda x, w: F.conv1d(x, w), (4, 8, 3), part) is None


def test_a_matrix_of_a_stack_by_a_number_that_the_graph_computes_is_added_to_as_one_matrix() -> None:
    call = one_call(lambda x, w, b: torch.addmm(b, x, w), (3, 6, 4), View(gathered=True))
    assert call is not None
    x, stack, bias = (torch.randn(shape, dtype=torch.float64) for shape in ((5, 6), (3, 6, 4), (4,)))
    assert torch.equal(call.op(x, stack, bias, 2), torch.addmm(bias, x, stack[2]))


def test_a_layer_called_as_a_module_is_not_read_here() -> None:
    graph = fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4))).graph
    layer = next(node for node in graph.nodes if node.op == "call_module")
    assert call_of(layer, layer.args[0], WHOLE, (4, 4)) is None  # type: ignore[arg-type]
