"""Example inputs in every form that users have them, and at other batch sizes."""

from __future__ import annotations

from collections import UserDict

import pytest
import torch
from capturing import assert_alike, both_captures, linears
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import dynrank_fx as dr
from dynrank_fx.tracing import (
    arguments,
    batch_size,
    double_batch_of_one,
    free_dimensions,
    fresh,
    in_order,
    joined,
    shapes_by_argument,
    split_inputs,
    tensors,
    with_batch,
)


@both_captures
@pytest.mark.parametrize(
    ("form", "positions", "keywords"),
    [
        (lambda x, y: (x, y), "xy", ""),
        (lambda x, y: [x, y], "xy", ""),
        (lambda x, y: {"x": x, "y": y}, "", "xy"),
        (lambda x, y: {"y": y, "x": x}, "", "yx"),
        (lambda x, y: UserDict(x=x, y=y), "", "xy"),
        (lambda x, y: ((x,), UserDict(y=y)), "x", "y"),
        (lambda x, y: ((x,), {"y": y}), "x", "y"),
        (lambda x, y: ((), {"x": x, "y": y}), "", "xy"),
        (lambda x, y: ((x, y), {}), "xy", ""),
    ],
    ids=[
        "tuple",
        "list",
        "dict",
        "dict in another order",
        "mapping",
        "pair and mapping",
        "pair",
        "pair of keywords",
        "pair of positions",
    ],
)
def test_example_inputs_come_in_every_documented_form(form, positions, keywords, how):
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 6), nn.Linear(4, 6)

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(x), self.b(y)

    torch.manual_seed(0)
    model, x, y = Two(), torch.randn(3, 8), torch.randn(3, 4)
    net = dr.transform(model, form(x, y), rank=dr.Fixed(1), how=how)
    flops = {row.site.name: row.site.flops for row in dr.plan_of(net).sites}
    assert flops == {"a.weight": 2 * 3 * 48, "b.weight": 2 * 3 * 24}
    given = {"x": torch.randn(5, 8), "y": torch.randn(5, 4)}
    args, kwargs = [given[name] for name in positions], {name: given[name] for name in keywords}
    assert_alike(net, model, *args, **kwargs)


def test_one_tensor_stands_for_a_tuple_of_it():
    x = torch.randn(3, 8)
    assert dr.plan_of(dr.transform(linears(), x, rank=dr.Fixed(2))).total_flops == 2 * 2 * 3 * 96
    with pytest.raises(dr.CaptureError, match="example inputs of type str are not understood: give a tuple"):
        dr.capture(linears(), "x")


# Forms


A, B = torch.arange(6.0).reshape(3, 2), torch.arange(3)


@pytest.mark.parametrize(
    ("given", "args", "kwargs"),
    [
        (A, (A,), {}),
        ((A, B), (A, B), {}),
        ([A, B], (A, B), {}),
        ({"x": A}, (), {"x": A}),
        (((A,), {"y": B}), (A,), {"y": B}),
        ((A, {"y": B}), (A, {"y": B}), {}),
        (((A,), {"y": B}, A), ((A,), {"y": B}, A), {}),
        ((), (), {}),
    ],
    ids=["tensor", "tuple", "list", "dict", "pair", "a dict as second argument", "three arguments", "none"],
)
def test_args_and_kwargs_are_told_apart_by_the_form_alone(given, args, kwargs):
    found_args, found_kwargs = split_inputs(given)
    assert found_args == args
    assert found_kwargs == kwargs
    if isinstance(given, dict):
        assert found_kwargs is not given, "the caller's dict may be changed afterwards"


def test_fresh_inputs_share_no_memory_and_no_graph_and_one_tensor_stays_one():
    leaf = torch.ones(2, requires_grad=True)
    given = {"a": (leaf * 2, 3, "x"), "b": [leaf, leaf]}
    found = fresh(given)
    assert found["a"][1:] == (3, "x")
    assert found["b"][0] is found["b"][1]
    for before, after in zip(tensors(given), tensors(found), strict=True):
        assert torch.equal(before, after)
        assert before.data_ptr() != after.data_ptr()
        assert not after.requires_grad


def test_a_graph_modules_keywords_are_put_into_the_order_of_its_forward():
    class Two(nn.Module):
        def forward(self, x: Tensor, *, first: Tensor, second: Tensor) -> Tensor:
            return x + first - second

    one, two = torch.ones(3), torch.zeros(3)
    graph = torch.fx.symbolic_trace(Two())
    given = ((A,), {"second": two, "first": one})
    args, kwargs = in_order(graph, given)
    assert args == (A,)
    assert list(kwargs.items()) == [("first", one), ("second", two)]
    assert in_order(Two(), given) is given, "other modules take them by name"


# Batches


def test_the_batch_is_the_first_dimension_of_the_first_tensor_that_has_one():
    assert batch_size(((torch.tensor(1.0), [B, A[:2]]), {})) == 3
    assert batch_size(((), {"n": 4, "x": A})) == 3
    assert batch_size(((1, torch.tensor(2)), {})) is None


def test_another_batch_repeats_the_rows_of_every_tensor_that_shares_the_batch():
    other, scalar = torch.ones(5, 2), torch.tensor(7.0)
    args, kwargs = with_batch(((A, other, scalar, "x"), {"b": B, "again": A}), 7)
    rows = [0, 1, 2, 0, 1, 2, 0]
    assert torch.equal(args[0], A[rows])
    assert torch.equal(kwargs["b"], B[rows])
    assert args[1] is other
    assert args[2] is scalar
    assert args[3] == "x"
    assert kwargs["again"] is args[0], "one tensor stays one"
    assert torch.equal(with_batch(((A,), {}), 2)[0][0], A[:2])


def test_a_batch_of_one_alone_is_doubled():
    args, _ = double_batch_of_one((A[:1], torch.tensor(1)), {})
    assert torch.equal(args[0], A[[0, 0]])
    assert double_batch_of_one((A,), {"b": B}) == ((A,), {"b": B})


def test_drawn_rows_are_new_repeatable_and_of_the_examples_distribution():
    x = 3 + 2 * torch.randn(50, 40, generator=torch.Generator().manual_seed(1))
    state = torch.get_rng_state()
    ((drawn, labels), _), again = (with_batch(((x, torch.arange(50) % 7), {}), 200, seed=4) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state), "of a generator of its own"
    assert torch.equal(drawn, again[0][0])
    assert not torch.equal(drawn, with_batch(((x,), {}), 200, seed=5)[0][0])
    assert drawn.shape == (200, 40)
    assert float(drawn.mean()) == pytest.approx(float(x.mean()), abs=0.1)
    assert float(drawn.std()) == pytest.approx(float(x.std()), abs=0.1)
    assert labels.dtype == torch.int64
    assert set(labels.tolist()) == set(range(7))


def test_rows_of_an_example_of_one_value_are_drawn_apart_and_below_a_known_limit():
    tokens, mask = torch.zeros(2, 6, dtype=torch.int32), torch.ones(2, 6, dtype=torch.bool)
    given = ((torch.zeros(2, 6), tokens, mask, torch.zeros(2, dtype=torch.int64)), {})
    (floats, drawn, kept, unlimited), _ = with_batch(given, 100, seed=0, limits=(None, 5, 5, None))
    assert float(floats.std()) == pytest.approx(1, abs=0.1)
    assert (drawn.dtype, set(drawn.flatten().tolist())) == (torch.int32, set(range(5)))
    assert bool(kept.all()), "a mask is no number below a limit"
    assert not unlimited.any()


def test_every_dimension_is_free_for_export_or_the_first_alone():
    model, x = nn.Tanh(), torch.randn(3, 4)
    for only_first, serves in ((False, True), (True, False)):
        shapes = free_dimensions((x, 2, torch.tensor(1.0)), {}, only_first=only_first)
        assert len(shapes) == 1, "numbers and scalars have no dimensions"
        graph = torch.export.export(model, (x,), dynamic_shapes=shapes).module()
        assert torch.equal(graph(torch.ones(5, 4)), torch.ones(5, 4).tanh())
        if serves:
            assert graph(torch.ones(3, 9)).shape == (3, 9)
        else:
            with pytest.raises(AssertionError):
                graph(torch.ones(3, 9))


def test_nested_inputs_are_named_as_torch_export_names_them():
    class Nested(nn.Module):
        def forward(self, batch: dict[str, list[Tensor]]) -> Tensor:
            return batch["ids"][0] + batch["ids"][1]

    batch = {"ids": [torch.ones(2), torch.zeros(2)]}
    paths = [path for path, _ in pytree.tree_flatten_with_path({"batch": batch})[0]]
    assert [joined(path) for path in paths] == ["batch_ids_0", "batch_ids_1"]
    assert list(torch.export.export(Nested(), (batch,)).graph_signature.user_inputs) == [joined(p) for p in paths]


class Caught(nn.Module):
    def forward(self, x: Tensor, *, scale: float = 1.0, **batch: Tensor) -> Tensor:
        return x * scale + batch["y"]


LEFT, RIGHT = torch.ones(2, 3), torch.ones(2, 3)
CALL = ((LEFT,), {"y": RIGHT, "scale": 2.0})
ROWS = {0: torch.export.Dim("rows")}
COLLECTION = torch.export.ShapesCollection()
COLLECTION[RIGHT] = ROWS


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        ({"x": ROWS, "y": ROWS, "scale": None}, [ROWS, ROWS]),
        ({"x": ROWS, "batch": {"y": ROWS}}, [ROWS, ROWS]),
        ({"y": ROWS}, [None, ROWS]),
        ((ROWS, None, {"y": ROWS}), [ROWS, ROWS]),
        (COLLECTION, [None, ROWS]),
        ({}, [None, None]),
    ],
)
def test_dynamic_shapes_of_every_form_are_by_argument(shapes, expected):
    assert list(arguments(Caught(), CALL)) == ["x", "scale", "y"]
    given = shapes_by_argument(Caught(), CALL, shapes)
    assert given == {"x": expected[0], "scale": None, "y": expected[1]}
    if None not in expected:
        net = dr.capture(Caught(), CALL, how=dr.Capture.EXPORT, dynamic_shapes=shapes)
        assert torch.equal(net(torch.ones(6, 3), y=torch.ones(6, 3), scale=2.0), torch.full((6, 3), 3.0))


def test_dynamic_shapes_of_other_arguments_are_refused_in_a_sentence():
    other = torch.export.ShapesCollection()
    other[torch.ones(1)] = ROWS
    for shapes, sentence in (
        ({"z": ROWS}, r"^there are dynamic shapes for 'z', .* name them as in \['x', 'scale', 'y'\]$"),
        ({"batch": {"z": ROWS}}, "^there are dynamic shapes for 'z'"),
        ((ROWS,), "^there are dynamic shapes of 1 argument: give those of each of"),
        (other, "^the ShapesCollection has a tensor that is none of the example inputs"),
    ):
        with pytest.raises(dr.CaptureError, match=sentence):
            shapes_by_argument(Caught(), CALL, shapes)
