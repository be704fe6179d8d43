"""Parts of a weight that a graph takes, read as views under torch.fx and torch.export."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from dynrank_fx.ops import WHOLE, Shape, View, gather_index, parts_of, reads_metadata

SHAPES = {"w": (6, 8), "s": (3, 6, 8)}
AT = torch.tensor([2, 0, 0, 1, 1])
# Of a matrix w or of a stack of matrices s; at is an index of its first axis.
PARTS: dict[str, Callable[..., Tensor]] = {
    "w.T": lambda w, s, at: w.T,
    "w.mT": lambda w, s, at: w.mT,
    "w.t()": lambda w, s, at: w.t(),
    "torch.t": lambda w, s, at: torch.t(w),
    "transpose": lambda w, s, at: w.transpose(-1, 0),
    "transpose by names": lambda w, s, at: torch.transpose(w, dim1=0, dim0=1),
    "swapaxes": lambda w, s, at: torch.swapaxes(w, 0, 1),
    "permute": lambda w, s, at: w.permute(1, 0),
    "permute by a tuple": lambda w, s, at: torch.permute(w, dims=(1, 0)),
    "permute nothing, twice": lambda w, s, at: w.permute(1, 0).permute(1, 0),
    "rows": lambda w, s, at: w[2:],
    "rows from the end": lambda w, s, at: w[-5:-1],
    "columns": lambda w, s, at: w[:, 1:4],
    "a block": lambda w, s, at: w[1:3, :-3],
    "all of it": lambda w, s, at: w[:],
    "narrow": lambda w, s, at: w.narrow(1, 2, 3),
    "narrow by names": lambda w, s, at: torch.narrow(w, length=3, start=2, dim=1),
    "narrow from the end": lambda w, s, at: w[1:].narrow(0, -4, 3),
    "split": lambda w, s, at: w.split(4, 1)[1],
    "split into a shorter last": lambda w, s, at: torch.split(w, 4)[-1],
    "split by sizes": lambda w, s, at: w.split([1, 2, 3])[2],
    "split by names": lambda w, s, at: w.split(dim=1, split_size=3)[1],
    "chunk": lambda w, s, at: w.chunk(4)[2],
    "chunk by names": lambda w, s, at: torch.chunk(w, dim=-1, chunks=3)[1],
    "a part of a part, turned": lambda w, s, at: w[1:5, 2:].T[1:4].chunk(2, 1)[1].mT,
    "cast": lambda w, s, at: w.to(torch.float32),
    "cast, then a part": lambda w, s, at: w.to(torch.bfloat16)[:, 3:].T,
    "one of a stack": lambda w, s, at: s[1],
    "the last of a stack": lambda w, s, at: s[-1],
    "a part of one of a stack": lambda w, s, at: s[2, 1:4].T,
    "select": lambda w, s, at: s.select(0, 1),
    "select by names": lambda w, s, at: torch.select(s, index=2, dim=0),
    "each of a stack turned": lambda w, s, at: s.transpose(1, 2),
    "each of a stack permuted": lambda w, s, at: s.permute(0, 2, 1),
    "a part of each of a stack": lambda w, s, at: s[:, 1:3, 2:],
    "chunks of each of a stack": lambda w, s, at: s.chunk(dim=1, chunks=2)[1],
    "one of a turned stack": lambda w, s, at: s.mT[:, 3:][1],
    "gathered": lambda w, s, at: s[at],
    "parts of gathered ones": lambda w, s, at: s[at][:, 2:5].mT,
    "gathered of a turned part": lambda w, s, at: s.mT[:, 1:3][at],
    "halves of gathered ones": lambda w, s, at: s[at].chunk(2, -1)[1],
}
OTHERS: dict[str, Callable[..., Tensor]] = {
    "every second row": lambda w, s, at: w[::2],
    "no rows": lambda w, s, at: w[3:3],
    "one row": lambda w, s, at: w[2],
    "one column": lambda w, s, at: w[:, 2],
    "rows by an index": lambda w, s, at: w[at],
    "a new axis": lambda w, s, at: w[None],
    "reshaped": lambda w, s, at: w.reshape(8, 6),
    "twice as much": lambda w, s, at: 2 * w,
    "cast to whole numbers": lambda w, s, at: w.to(torch.int32),
    "cast twice": lambda w, s, at: w.to(torch.float32).to(torch.float64),
    "some of a stack": lambda w, s, at: s[1:],
    "a stack turned another way": lambda w, s, at: s.transpose(0, 1),
    "a stack permuted another way": lambda w, s, at: s.permute(2, 1, 0),
    "one row of each of a stack": lambda w, s, at: s[:, 2],
    "one row of each, selected": lambda w, s, at: torch.select(s, index=0, dim=1),
    "one of the gathered": lambda w, s, at: s[at][0],
    "some of the gathered": lambda w, s, at: s[at][:3],
    "chunks of the gathered": lambda w, s, at: s[at].split(3)[0],
    "the gathered from a place": lambda w, s, at: s[at].narrow(0, 0, 3),
    "gathered twice": lambda w, s, at: s[at][at],
    "one of a stack, gathered": lambda w, s, at: s[1][at],
    "gathered columns": lambda w, s, at: s[:, :, at],
}
EVERY = PARTS | OTHERS


class Takes(nn.Module):
    """Gives every part at once, so that one capture serves all tests."""

    def forward(self, w: Tensor, s: Tensor, at: Tensor) -> tuple[Tensor, ...]:
        return tuple(take(w, s, at) for take in EVERY.values())


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, dtype=torch.float64, generator=generator) for name, shape in SHAPES.items()}


@functools.cache
def views(how: str) -> tuple[dict[str, tuple[str, View]], dict[str, fx.Node]]:
    """By what is taken: of which weight, by which view (where it is one), and the node that gives it."""
    graph = fx.symbolic_trace(Takes()).graph
    if how == "torch.export":
        graph = torch.export.export(Takes(), (*weights().values(), AT), strict=False).graph_module.graph
    waiting = [(node, node.name, WHOLE) for node in graph.nodes if node.name in SHAPES]
    found: dict[fx.Node, tuple[str, View]] = {node: (name, view) for node, name, view in waiting}
    while waiting:
        node, name, view = waiting.pop()
        for user in node.users:
            parts = [] if user.op == "output" else parts_of(user, view, SHAPES[name]) or []
            waiting += [(part, name, taken) for part, taken in parts]
            found |= {part: (name, taken) for part, taken in parts}
    (results,) = graph.output_node().args
    given = dict(zip(EVERY, results, strict=True))
    return {what: found[node] for what, node in given.items() if node in found}, given


both = pytest.mark.parametrize("how", ["torch.fx", "torch.export"])


@both
@pytest.mark.parametrize("what", PARTS)
def test_a_view_takes_what_the_code_takes(what: str, how: str) -> None:
    name, view = views(how)[0][what]
    got = view(weights()[name], AT)
    expected = PARTS[what](**weights(), at=AT)
    assert got.dtype == expected.dtype
    assert torch.equal(got, expected)
    assert view.shape(SHAPES[name])[-2:] == tuple(expected.shape[-2:])


@both
@pytest.mark.parametrize("what", OTHERS)
def test_what_is_no_part_that_factors_can_take_is_no_view(what: str, how: str) -> None:
    assert what not in views(how)[0]


def only_node(use: Callable[..., object]) -> fx.Node:
    """What the function does with its weight, under torch.fx."""
    graph = fx.symbolic_trace(lambda w, at: use(w, at)).graph
    (weight,) = [node for node in graph.nodes if node.name == "w"]
    (user,) = weight.users
    return user


@pytest.mark.parametrize(
    ("use", "asks"),
    [
        (lambda w, at: w.shape, True),
        (lambda w, at: w.dtype, True),
        (lambda w, at: w.size(1), True),
        (lambda w, at: w.device, True),
        (lambda w, at: w.type(), True),
        (lambda w, at: torch.numel(w), True),
        (lambda w, at: w.is_floating_point(), True),
        (lambda w, at: w.type(torch.float32), False),
        (lambda w, at: w.data, False),
        (lambda w, at: w.T, False),
        (lambda w, at: w.norm(), False),
        (lambda w, at: w + at, False),
    ],
)
def test_only_what_asks_how_the_weight_looks_reads_metadata(use: Callable[..., object], asks: bool) -> None:
    assert reads_metadata(only_node(use)) is asks


def test_an_index_is_what_the_graph_computes_and_no_number_or_slice() -> None:
    index = gather_index(only_node(lambda w, at: w[at]))
    assert index is not None
    assert index.name == "at"
    for use in (lambda w, at: w[1], lambda w, at: w[1:], lambda w, at: w[:, at], lambda w, at: w.T):
        assert gather_index(only_node(use)) is None


def test_a_part_of_a_shape_is_read_off_the_whole_weights() -> None:
    graph = fx.symbolic_trace(lambda w: w[:, 2:6][:, 1:3]).graph
    (first,) = next(node for node in graph.nodes if node.op == "placeholder").users
    (second,) = first.users
    shape: Shape = (6, 8)
    ((_, view),) = parts_of(first, WHOLE, shape) or []
    assert view == View(columns=(2, 6))
    assert parts_of(second, view, shape) == [(second, View(columns=(3, 5)))]
