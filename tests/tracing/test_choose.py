"""Capture: what the user has, as a Net that computes the same, with nothing else changed; every refusal a sentence."""

from __future__ import annotations

import copy
import dataclasses
import io
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import Modal, gradients, randomized
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import dynrank_fx as dr

CAPTURES = (dr.Capture.SYMBOLIC, dr.Capture.EXPORT)
both_captures = pytest.mark.parametrize("how", CAPTURES, ids=lambda how: how.name)


def linears() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8))


def same(a: Any, b: Any) -> bool:
    leaves_a, spec_a = pytree.tree_flatten(a)
    leaves_b, spec_b = pytree.tree_flatten(b)
    return spec_a == spec_b and all(
        torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in zip(leaves_a, leaves_b, strict=True)
    )


def assert_alike(net: nn.Module, model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """The same output, buffers and gradients after a training step's forward, and the same output in eval mode."""
    for mode in (True, False):
        results = []
        for each in (model.train(mode), net.train(mode)):
            torch.manual_seed(3)
            each.zero_grad()
            output = each(*args, **kwargs)
            total = sum(t.sum() for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad)
            total.backward()
            results.append((output, {name: p.grad for name, p in each.named_parameters()}, dict(each.named_buffers())))
            each.zero_grad()
        (expected, gradients_e, buffers_e), (got, gradients_g, buffers_g) = results
        assert same(got, expected)
        for name, gradient in gradients_e.items():
            assert (gradient is None) == (gradients_g[name] is None), name
            assert gradient is None or torch.equal(gradients_g[name], gradient), name
        for name, buffer in buffers_e.items():
            assert torch.equal(buffers_g[name], buffer), name


# What is given


def exported(model: nn.Module, x: Tensor) -> torch.export.ExportedProgram:
    shapes = torch.export.ShapesCollection()
    shapes[x] = {0: torch.export.Dim.AUTO}
    return torch.export.export(model, (x,), dynamic_shapes=shapes)


GIVEN: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "module": lambda model, x: model,
    "symbolic trace": lambda model, x: fx.symbolic_trace(model),
    "exported module": lambda model, x: exported(model, x).module(),
    "exported module without guards": lambda model, x: exported(model, x).module(check_guards=False),
    "exported program": exported,
    "net": lambda model, x: dr.capture(model, (x,)),
}


@pytest.mark.parametrize("examples", [True, False], ids=["with example", "without"])
@pytest.mark.parametrize("given", GIVEN)
def test_whatever_form_a_model_has_it_becomes_the_same_trainable_net(given, examples):
    model, x = linears(), torch.randn(4, 8)
    net = dr.capture(GIVEN[given](model, x), (x,) if examples else None)
    assert_alike(net, model, torch.randn(5, 8))
    assert sorted(net.state_dict()) == sorted(model.state_dict())
    assert not any(a is b for a in net.parameters() for b in model.parameters())
    plan = dr.make_plan(net, dr.Fixed(2), (x,))
    assert [row.site.name for row in plan.sites] == ["0.weight", "2.weight"]


@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec")
@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("how", [*CAPTURES, None], ids=str)
def test_however_it_was_captured_the_truncated_model_saves_loads_copies_and_exports(given, how):
    model, x = linears(), torch.randn(4, 8)
    net = dr.transform(GIVEN[given](model, x), (x,), rank=dr.Fixed(2), how=how)
    dr.enter_(net, dr.Phase.LOW)
    small, file = dr.truncate(net), io.BytesIO()
    torch.save(small, file)
    assert b"dynrank" not in file.getvalue()
    file.seek(0)
    more, expected = torch.randn(7, 8), None
    for twin in (torch.load(file, weights_only=False), copy.deepcopy(small), exported(small, x).module(), small):
        expected = net(more) if expected is None else expected
        torch.testing.assert_close(twin(more), expected)


def test_a_copy_is_independent_of_what_was_captured():
    model, x = linears(), torch.randn(4, 8)
    net = dr.capture(model, (x,))
    twin = copy.deepcopy(net)
    before = net(x)
    with torch.no_grad():
        for p in (*model.parameters(), *twin.parameters()):
            p.zero_()
    assert torch.equal(net(x), before)
    assert type(net).__name__ == type(twin).__name__ == "Sequential"
    with pytest.raises(dr.CaptureError, match=r"shallow copy .* use copy\.deepcopy"):
        copy.copy(net)


# Inputs and outputs


class Signature(nn.Module):
    """Positional, keyword, default and None inputs; a dict in and out."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(
        self, x: Tensor, features: dict[str, Tensor], scale: float = 2.0, mask: Tensor | None = None, *, shift: Tensor
    ) -> dict[str, Any]:
        h = torch.tanh(self.a(x) + features["left"] * features["right"]) * scale
        if mask is not None:
            h = h * mask
        return {"out": self.b(h) + shift, "extra": (h, [x])}


def signature_inputs(rows: int, **more: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    x, left, right, shift = torch.randn(4, rows, 8).unbind()
    return (x, {"left": left, "right": right}), {"shift": shift, **more}


@pytest.mark.parametrize("masked", [True, False])
def test_dicts_defaults_keywords_and_none_are_passed_as_in_the_original(masked):
    torch.manual_seed(0)
    model = Signature()
    more = {"mask": torch.rand(4, 8)} if masked else {}
    net = dr.transform(model, signature_inputs(4, **more), rank=dr.Fixed(2))
    args, kwargs = signature_inputs(4, **more)
    assert_alike(net, model, *args, **kwargs)
    assert dr.plan_of(net).total_flops == 2 * 2 * 4 * 64
    dr.enter_(net, dr.Phase.LOW)
    assert same(dr.truncate(net)(*args, **kwargs), net(*args, **kwargs))


def test_a_symbolic_graph_keeps_defaults_dicts_and_scalars_free():
    class Free(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 8)

        def forward(self, x: Tensor, features: dict[str, Tensor], scale: float = 2.0) -> dict[str, Any]:
            return {"out": self.a(x) * scale + features["left"], "extra": (x, [scale])}

    torch.manual_seed(0)
    model, (x, left) = Free(), torch.randn(2, 4, 8)
    net = dr.transform(model, (x, {"left": left}), rank=dr.Fixed(2), how=dr.Capture.SYMBOLIC)
    assert_alike(net, model, x, {"left": left})
    assert_alike(net, model, x, {"left": left}, 3.0)
    assert_alike(net, model, x, scale=0.5, features={"left": left})


def test_a_signature_that_symbolic_tracing_cannot_write_is_refused_in_words():
    with pytest.raises(
        dr.CaptureError, match="Signature cannot be traced symbolically: SyntaxError: non-default argument"
    ):
        dr.capture(Signature(), how=dr.Capture.SYMBOLIC)


@both_captures
@pytest.mark.parametrize(
    ("form", "positions", "keywords"),
    [
        (lambda x, y: (x, y), "xy", ""),
        (lambda x, y: [x, y], "xy", ""),
        (lambda x, y: {"x": x, "y": y}, "", "xy"),
        (lambda x, y: {"y": y, "x": x}, "", "yx"),
        (lambda x, y: ((x,), {"y": y}), "x", "y"),
        (lambda x, y: ((), {"x": x, "y": y}), "", "xy"),
        (lambda x, y: ((x, y), {}), "xy", ""),
    ],
    ids=["tuple", "list", "dict", "dict in another order", "pair", "pair of keywords", "pair of positions"],
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


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_an_example_of_one_row_serves_every_batch_under_export(rows):
    model = Modal().eval()
    net = dr.capture(model, (torch.randn(1, 4, 6, 6),), how=dr.Capture.EXPORT)
    x = torch.randn(rows, 4, 6, 6)
    assert torch.equal(net(x), model(x))


class Loops(nn.Module):
    """A loop over the rows of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.fc(row) for row in x])


class Branches(Loops):
    """A branch on the size of the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * 2 if x.shape[0] > 4 else self.fc(x)


class Switches(Loops):
    """A branch on an input that is no tensor."""

    def forward(self, x: Tensor, double: bool = False, name: str = "a", mask: Tensor | None = None) -> Tensor:
        x = self.fc(x) if mask is None else self.fc(x) * mask
        return x * 2 if double else x


@pytest.mark.parametrize(
    ("model", "example", "good", "bad", "sentence"),
    [
        (Loops, (torch.ones(3, 8),), (torch.ones(3, 8),), (torch.ones(5, 8),), "exported for 3 rows of x, and serves"),
        (
            Branches,
            (torch.ones(3, 8),),
            (torch.ones(4, 8),),
            (torch.ones(5, 8),),
            "4 rows of x or fewer, and serves no",
        ),
        (Branches, (torch.ones(6, 8),), (torch.ones(5, 8),), (torch.ones(4, 8),), "5 rows of x or more, and serves no"),
        (
            Switches,
            (torch.ones(3, 8), True),
            (torch.ones(1, 8), True),
            (torch.ones(3, 8), False),
            "for double=True, and",
        ),
        (
            Switches,
            (torch.ones(3, 8), True, "b"),
            (torch.ones(4, 8), True, "b"),
            (torch.ones(3, 8), True, "c"),
            "name='b'",
        ),
        (
            Switches,
            (torch.ones(3, 8), True, "b", None),
            (torch.ones(3, 8), True, "b", None),
            (torch.ones(3, 8), True, "b", torch.ones(8)),
            "mask=None, and serves no other",
        ),
    ],
)
@pytest.mark.parametrize("given", ["module", "exported"])
def test_what_export_made_a_constant_of_is_refused_when_it_changes(given, model, example, good, bad, sentence):
    """Silently taking the example's value would be a wrong result."""
    torch.manual_seed(0)
    model = model()
    if given == "exported":
        shapes = torch.export.ShapesCollection()
        shapes[example[0]] = {0: torch.export.Dim.AUTO}
        source: Any = torch.export.export(model, example, dynamic_shapes=shapes).module()
    else:
        source = model
    net = dr.transform(source, example, rank=dr.Fixed(2), how=dr.Capture.EXPORT)
    compiled = torch.compile(net, fullgraph=True, backend="eager", dynamic=False)
    small = dr.truncate(net)
    assert torch.equal(net(*good), model(*good))
    assert torch.equal(compiled(*good), model(*good))
    assert small(*good).shape == model(*good).shape
    for each in (net, small):
        with pytest.raises(AssertionError, match=sentence):
            each(*bad)


# Modes and buffers


class Counting(nn.Module):
    """Buffers that change in forward, in place and by assignment, in training only and always."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(8), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        if self.training:
            self.mean.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        return self.norm(self.fc(x)) + self.mean * self.calls


class Assigning(Counting):
    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return self.fc(x) * self.calls


@pytest.mark.parametrize("how", [*CAPTURES, None], ids=str)
def test_buffers_change_as_in_the_original_and_not_while_capturing(how):
    torch.manual_seed(0)
    model, x = randomized(Counting()), torch.randn(4, 8)
    net = dr.transform(model, (x,), rank=dr.Fixed(2), how=how)
    assert dict(net.named_buffers()).keys() == dict(model.named_buffers()).keys()
    for _ in range(2):
        assert_alike(net, model, x)
    calls = float(model.calls)
    assert calls > 4
    dr.enter_(net, dr.Phase.LOW)
    small = dr.truncate(net.eval())
    small(x)
    assert float(small.calls) == calls + 1, "the update is no dead code"
    assert "mean" not in small.state_dict()


def test_buffers_that_are_assigned_are_captured_by_export():
    torch.manual_seed(0)
    model, x = Assigning(), torch.randn(4, 8)
    with pytest.raises(dr.CaptureError, match="RuntimeError: forward assigns the buffer calls, which a symbolic graph"):
        dr.capture(model, (x,), how=dr.Capture.SYMBOLIC)
    net = dr.transform(model, (x,), rank=dr.Fixed(2))
    assert_alike(net, model, x)
    assert float(net.calls) == float(model.calls) == 2


def test_buffers_that_a_part_assigns_are_captured_too():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), Assigning()), torch.randn(4, 8)
    net = dr.transform(model, (x,), rank=dr.Fixed(2), how=dr.Capture.EXPORT)
    assert_alike(net, model, x)
    assert float(net.get_buffer("1.calls")) == float(model[1].calls) == 2


class Growing(nn.Module):
    """A part whose state has the shape of what it last saw."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.register_buffer("last", torch.zeros(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x) + self.last
        self.last = y.detach().mean(0)
        return y


def test_a_graph_that_loses_a_change_of_a_buffer_is_not_taken():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), Growing()), torch.randn(4, 8)
    with pytest.raises(dr.CaptureError, match=r"its graph changes the buffer 1.last otherwise on the example inputs"):
        dr.capture(model, (x,), how=dr.Capture.EXPORT)
    net = dr.capture(copy.deepcopy(model), (x,))
    for _ in range(2):
        assert torch.equal(net(x), model(x))


@both_captures
@pytest.mark.parametrize("training", [True, False])
def test_the_mode_and_the_parts_set_apart_are_kept(training, how):
    torch.manual_seed(0)
    model, x = randomized(Modal()).train(training), torch.randn(4, 4, 6, 6)
    model.norm.train(not training)
    net = dr.capture(model, (x,), how=how)
    assert net.training == training
    for run in range(2):
        outputs = []
        for each in (model, net):
            torch.manual_seed(run)
            outputs.append(each(x))
        assert torch.equal(*outputs)
        assert torch.equal(model.norm.running_mean, net.norm.running_mean)


class Freezing(nn.Module):
    """A part that keeps its batch norm frozen whatever mode it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.fc(x))

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        self.norm.eval()
        return self


@pytest.mark.parametrize("how", [*CAPTURES, None], ids=str)
def test_a_part_that_freezes_itself_stays_frozen_in_training(how):
    torch.manual_seed(0)
    model, x = randomized(Holder(Freezing())), torch.randn(4, 8)
    net = dr.capture(model, (x,), how=how)
    running = model.block.norm.running_mean.clone()
    assert_alike(net, model, x)
    assert torch.equal(net.train().block.norm.running_mean, running)


class Sampled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.fc(x), 0.3, self.training)
        if self.training:
            x = x + 0.1 * torch.randn_like(x)
        return x


@pytest.mark.parametrize("how", [*CAPTURES, None], ids=str)
def test_dropout_and_noise_follow_the_mode_after_copying_too(how):
    model, x = Sampled(), torch.randn(4, 8)
    net = dr.transform(model, (x,), rank=dr.Fixed(2), how=how)
    assert_alike(copy.deepcopy(net), model, x)
    assert_alike(net, model, x)
    assert torch.equal(net.eval()(x), net(x))
    assert not torch.equal(net.train()(x), net(x))


def test_a_graph_exported_in_one_mode_refuses_the_other_in_words():
    x = torch.randn(4, 4, 6, 6)
    for training, name in ((True, "training"), (False, "evaluation")):
        model = randomized(Modal()).train(training)
        net = dr.transform(torch.export.export(model, (x,)).module(), rank=dr.Fixed(2))
        torch.manual_seed(0)
        expected = model(x)
        torch.manual_seed(0)
        assert torch.equal(net.train(training)(x), expected)
        for each in (net, copy.deepcopy(net)):
            with pytest.raises(
                dr.CaptureError, match=f"exported in {name} mode and cannot leave it: give the nn.Module"
            ):
                each.train(not training)
    without = dr.transform(torch.export.export(linears().eval(), (torch.randn(3, 8),)).module(), rank=dr.Fixed(2))
    assert without.train().training, "no operation of it depends on the mode"


class ConstantOfTheMode(Loops):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * torch.tensor(2.0 if self.training else 3.0)


class BranchOfTheMode(Loops):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) + torch.cond(x.sum() > 1e6, lambda x: x * 1, lambda x: F.dropout(x, 0.5, self.training), (x,))


@pytest.mark.parametrize("how", [*CAPTURES, None], ids=str)
@pytest.mark.parametrize("make", [ConstantOfTheMode, BranchOfTheMode])
def test_modes_that_differ_in_a_constant_or_inside_a_branch_only_are_kept_apart(make, how):
    if make is BranchOfTheMode and how is dr.Capture.SYMBOLIC:
        how = None  # cond is for export
    torch.manual_seed(0)
    model, x = make(), torch.randn(4, 8)
    net = dr.transform(model, (x,), rank=dr.Fixed(2), how=how)
    assert_alike(net, model, x)
    assert_alike(copy.deepcopy(net), model, x)


def test_where_the_mode_changes_nothing_there_is_one_graph():
    for how in CAPTURES:
        net = dr.capture(linears(), (torch.randn(4, 8),), how=how)
        assert net.graphs[True] is net.graphs[False]


# What a graph cannot hold


class NoGrad(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.a(x)
        return self.b(x)


class Autocast(NoGrad):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            x = self.a(x)
        return self.b(x.float())


@pytest.mark.parametrize("make", [NoGrad, Autocast])
def test_gradients_or_autocast_switched_inside_forward_are_not_lost(make):
    """A symbolic graph would train what the model says not to train."""
    torch.manual_seed(0)
    model, x = make(), torch.randn(4, 8)
    with pytest.raises(dr.CaptureError, match=r"the model .*`x = self\.a\(x\)`.* gradients or autocast are switched"):
        dr.capture(model, (x,), how=dr.Capture.SYMBOLIC)
    for how, sites in ((dr.Capture.EXPORT, ["b.weight"]), (None, ["a.weight", "b.weight"])):
        net = dr.transform(model, (x,), rank=dr.Fixed(2), how=how)
        assert_alike(net, model, x)
        assert [row.site.name for row in dr.plan_of(net).sites] == sites


class DataDependent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = linears()

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return self.inner(x)
        return x


class Holder(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.block = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


def test_a_branch_on_data_is_refused_with_the_module_and_the_line_or_left_as_it_is():
    torch.manual_seed(0)
    model, x = Holder(DataDependent()), torch.rand(4, 8)
    for how in CAPTURES:
        with pytest.raises(dr.CaptureError) as refused:
            dr.capture(model, (x,), how=how)
        assert "block (DataDependent, test_choose.py:" in str(refused.value)
        assert "`if x.sum() > 0:`" in str(refused.value)
        assert "\n" not in str(refused.value)
    with pytest.raises(dr.CaptureError, match=r"block .*`if x\.sum\(\) > 0:`.* cannot be traced symbolically"):
        dr.capture(model)
    net = dr.transform(model, (x,), rank=dr.Fixed(2))
    assert [row.site.name for row in dr.plan_of(net).sites] == ["block.inner.0.weight", "block.inner.2.weight"]
    for each in (x, -x):
        assert_alike(net, model, each.requires_grad_())


def test_a_branch_on_the_shape_falls_to_export_and_without_example_says_what_is_missing():
    class Shaped(Loops):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x if x.ndim == 2 else x.flatten(1))

    model, x = Shaped(), torch.randn(4, 8)
    net = dr.transform(model, (x,), rank=dr.Fixed(2))
    assert_alike(net, model, torch.randn(7, 8))
    with pytest.raises(
        dr.CaptureError, match=r"torch.export needs example inputs to trace Shaped; pass example_inputs"
    ):
        dr.capture(model, how=dr.Capture.EXPORT)


def test_cond_keeps_both_branches_and_leaves_their_weights_dense():
    class Cond(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.cond(x.sum() > 0, lambda x: self.a(x), lambda x: self.b(x), (x,)))

    torch.manual_seed(0)
    model = Cond()
    net = dr.transform(model, (torch.randn(4, 8),), rank=dr.Fixed(2))
    assert [row.site.name for row in dr.plan_of(net).sites] == ["c.weight"]
    assert {s.name for s in dr.plan_of(net).skipped} == {"a.weight", "b.weight"}
    for sign in (1, -1):
        x = sign * torch.rand(4, 8)
        for each in (net, copy.deepcopy(net)):
            torch.testing.assert_close(each(x), model(x))
    with torch.no_grad():
        for parameter in (*net.a.parameters(), *net.b.parameters()):
            parameter.zero_()
    assert torch.equal(net(torch.rand(4, 8)), net.c.bias.expand(4, 8)), "the branches read the net's own weights"


@pytest.mark.parametrize(
    ("example", "sentence"),
    [
        (
            (torch.zeros(4, 9),),
            r"float32\[4, 9\]\): (RuntimeError: mat1|AssertionError: .* exported for 8 numbers in dimension 1 of)",
        ),
        ((torch.zeros(4, 8), 3), r"float32\[4, 8\], int\): "),
        ({"x": torch.zeros(4, 8, dtype=torch.int64)}, r"x=int64\[4, 8\]\): "),
        ((torch.zeros(4, 8, dtype=torch.float64),), r"float64\[4, 8\]\): RuntimeError"),
    ],
)
@pytest.mark.parametrize("given", ["module", "symbolic trace", "exported module"])
def test_example_inputs_that_do_not_fit_are_shown_with_their_shapes(given, example, sentence):
    model = GIVEN[given](linears(), torch.zeros(3, 8))
    with pytest.raises(dr.CaptureError, match=r"does not accept the example inputs \(" + sentence) as refused:
        dr.capture(model, example)
    assert "\n" not in str(refused.value)


def test_a_model_that_raises_or_prints_is_heard(capsys):
    class Loud(Loops):
        def forward(self, x: Tensor) -> Tensor:
            print("called")
            return self.fc(x)

    class Broken(Loops):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyError("no such table\nwith a second line")

    x = torch.randn(3, 8)
    net = dr.transform(Loud(), (x,), rank=dr.Fixed(2))
    assert "called" in capsys.readouterr().out
    net(x)
    assert capsys.readouterr().out == "", "a graph does not print"
    for how in (*CAPTURES, None):
        with pytest.raises(
            dr.CaptureError, match=r"Broken does not accept the example inputs .*KeyError: 'no such table"
        ):
            dr.capture(Broken(), (x,), how=how)
    with pytest.raises(dr.CaptureError, match=r"the model \(Broken, test_choose.py:\d+: `raise KeyError"):
        dr.capture(Broken())


def test_hooks_of_the_model_itself_are_not_for_symbolic_tracing():
    model, x = linears(), torch.randn(4, 8)
    model.register_forward_hook(lambda module, args, output: output * 2)
    model[0].register_forward_hook(lambda module, args, output: output + 1)
    with pytest.raises(
        dr.CaptureError, match="Sequential has hooks of its own, which a symbolic graph would leave out"
    ):
        dr.capture(model, (x,), how=dr.Capture.SYMBOLIC)
    for how in (dr.Capture.EXPORT, None):
        assert_alike(dr.capture(model, (x,), how=how), model, x)


@pytest.mark.parametrize("name", ["graph", "meta", "code", "setting", "graphs"])
def test_a_part_with_a_name_that_the_net_needs_is_refused_by_name(name):
    for part in (nn.Linear(8, 8), nn.Parameter(torch.ones(8)), torch.ones(8)):
        model = linears()
        setattr(model, name, part)
        with pytest.raises(
            dr.CaptureError, match=f"calls a part of it '{name}', which a graph module needs for itself"
        ):
            dr.capture(model, (torch.zeros(3, 8),))


@pytest.mark.parametrize(
    "given", [lambda x: x, "model.py", None, torch.ones(3)], ids=["function", "str", "None", "Tensor"]
)
def test_what_is_no_model_is_refused_in_words(given):
    kind = type(given).__name__
    with pytest.raises(dr.CaptureError, match=f"a {kind} is no model that can be traced: give an nn.Module"):
        dr.capture(given)
    with pytest.raises(dr.CaptureError, match="'export' is no way to capture a model: give"):
        dr.capture(linears(), how="export")


@dataclasses.dataclass
class Output:
    logits: Tensor
    hidden: tuple[Tensor, ...]


def test_a_dataclass_as_the_output_is_kept():
    class Structured(Loops):
        def forward(self, x: Tensor) -> Output:
            h = self.fc(x)
            return Output(h * 2, (h, h / 0))

    torch.manual_seed(0)
    model, x = Structured(), torch.randn(4, 8)
    net = dr.transform(model, (x,), rank=dr.Fixed(2))
    got, expected = net(x), model(x)
    assert type(got) is Output
    assert torch.equal(got.logits, expected.logits)
    assert torch.equal(got.hidden[0], expected.hidden[0])


def test_a_compiled_model_is_captured_as_the_model_in_it():
    model, x = linears(), torch.randn(4, 8)
    net = dr.capture(torch.compile(model, backend="eager"), (x,))
    assert sorted(net.state_dict()) == sorted(model.state_dict())
    assert_alike(net, model, x)


def test_a_model_that_cannot_be_copied_is_refused_in_words():
    class Uncopyable(Loops):
        def __init__(self) -> None:
            super().__init__()
            self.source = (i for i in range(3))

    with pytest.raises(dr.CaptureError, match=r"Uncopyable cannot be copied .*so make the model support copy.deepcopy"):
        dr.capture(Uncopyable(), (torch.zeros(3, 8),))


def test_a_lazy_module_without_weights_is_refused_by_name():
    model = nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 8))
    with pytest.raises(dr.CaptureError, match=r"0 \(LazyLinear\) has no weights yet: call the model once"):
        dr.capture(model, (torch.zeros(3, 5),))
    model(torch.zeros(3, 5))
    assert len(dr.plan_of(dr.transform(model, (torch.zeros(3, 5),), rank=dr.Fixed(2))).sites) == 2


# What is kept and what is left alone


class Attributes(nn.Module):
    """Numbers, strings, lists, and tensors held as plain attributes, in the model and in a part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.scale, self.names, self.kind = 3.0, ["a", "b"], "x"
        self.shift = torch.arange(8.0)
        self.part = nn.Module()
        self.part.table = torch.linspace(0, 1, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x) * self.scale * len(self.names) + self.shift + torch.ones(8, dtype=x.dtype)
        return x * self.part.table if self.kind == "x" else x


@pytest.mark.parametrize("how", [*CAPTURES, None], ids=str)
def test_constants_are_kept_move_with_the_net_and_are_no_part_of_its_state(how):
    torch.manual_seed(0)
    model, x = Attributes(), torch.randn(4, 8)
    net = dr.transform(model, (x,), rank=dr.Fixed(2), how=how)
    assert_alike(net, model, x)
    assert sorted(net.state_dict()) == sorted(model.state_dict())
    for each in (net, copy.deepcopy(net), dr.truncate(net)):
        assert each.double()(x.double()).dtype == torch.float64
    net.float()
    assert torch.equal(net(x), model(x))
    model.shift.zero_()
    assert not torch.equal(net(x), model(x)), "the constants are copies"


def test_hooks_of_the_callers_model_are_not_called_or_moved():
    calls = []
    model, x = linears(), torch.randn(4, 8)
    model.register_forward_hook(lambda *args: calls.append("model"))
    model[1].register_forward_hook(lambda *args: calls.append("tanh"))
    dr.capture(model, (x,))
    calls.clear()
    model(x)
    assert calls == ["tanh", "model"]


class Overwriting(Loops):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.mul_(2))


@pytest.mark.parametrize("how", [*CAPTURES, None], ids=str)
def test_arguments_that_the_model_writes_into_stay_as_they_were(how):
    torch.manual_seed(0)
    model, x = Overwriting(), torch.randn(4, 8)
    keep = x.clone()
    net = dr.transform(model, (x,), rank=dr.Fixed(2), how=how)
    assert torch.equal(x, keep)
    assert torch.equal(net(x.clone()), model(x.clone()))


class Drawing(Loops):
    """Draws from every generator, in both modes."""

    def forward(self, x: Tensor) -> Tensor:
        noise = random.random() + float(np.random.rand())
        return F.dropout(self.fc(x), 0.5, training=True) + noise + torch.randn_like(x)


@pytest.mark.parametrize("how", [*CAPTURES, None], ids=str)
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("make", [Drawing, Sampled])
def test_nothing_process_wide_changes(make, grad, how):
    model, x = make(), torch.randn(4, 8)

    def state() -> tuple[Any, ...]:
        return (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.backends.mha.get_fastpath_enabled(),
            torch.get_default_dtype(),
            torch.are_deterministic_algorithms_enabled(),
            torch.is_autocast_enabled("cpu"),
            random.getstate(),
            np.random.get_state()[1].tolist(),
            torch.get_rng_state().tolist(),
            [module.training for module in model.modules()],
            {name: p.tolist() for name, p in model.named_parameters()},
        )

    with torch.set_grad_enabled(grad):
        before = state()
        net = dr.capture(model, (x,), how=how)
        plan = dr.make_plan(net, dr.Fixed(2), (x,))
        dr.factorize(net, plan)
        assert state() == before
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    assert all(p.grad is None for p in model.parameters())


@both_captures
def test_a_net_captured_without_gradients_trains(how):
    model, x = linears(), torch.randn(4, 8)
    with torch.no_grad():
        net = dr.capture(model, (x,), how=how)
    expected, got = gradients(model, x), gradients(net, x)
    assert expected.keys() == got.keys()
    assert all(torch.equal(got[name], gradient) for name, gradient in expected.items())


# Measuring


class Queries(nn.Module):
    """A parameter as the input of a layer, and a shape that depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.fc, self.head = nn.Parameter(torch.randn(3, 8)), nn.Linear(8, 8), nn.Linear(8, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        kept = x[(x.sum(1) > 0).nonzero()[:, 0]]
        return self.head(kept).sum(0) + self.head(torch.tanh(self.fc(self.query))).sum(0)


def test_a_shape_that_depends_on_the_data_is_measured_on_the_data_and_nothing_is_left_behind():
    torch.manual_seed(0)
    model, x = Queries(), torch.randn(6, 8)
    kept = int((x.sum(1) > 0).sum())
    net = dr.capture(model, (x,), how=dr.Capture.SYMBOLIC)
    keep, state = x.clone(), torch.get_rng_state()
    plan = dr.make_plan(net, dr.Fixed(1), (x,))
    assert [row.site.flops for row in plan.sites] == [2 * 3 * 64, 2 * (3 + kept) * 32]
    assert plan.total_flops == sum(row.site.flops for row in plan.sites)
    assert float(net.calls) == 0
    assert torch.equal(x, keep)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("how", [*CAPTURES, None], ids=str)
def test_a_parameter_as_the_input_of_a_layer_is_measured_too(how):
    class Asked(Queries):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(x).sum(0) + self.head(self.fc(self.query)).sum(0)

    torch.manual_seed(0)
    model, x = Asked(), torch.randn(6, 8)
    plan = dr.plan_of(dr.transform(model, (x,), rank=dr.Fixed(1), how=how))
    assert {row.site.name: row.site.flops for row in plan.sites} == {
        "fc.weight": 2 * 3 * 64,
        "head.weight": 2 * (3 + 6) * 32,
    }


# What torch.export would get wrong by itself


class Attending(nn.Module):
    """Attention over a sequence of any length, with positions; symbolic tracing cannot unpack its shape."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(20, 8), nn.Embedding(32, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        batch, length = tokens.shape
        x = self.embed(tokens) + self.positions(torch.arange(length, device=tokens.device))
        return self.layer(x, src_key_padding_mask=mask).reshape(batch * length, 8)


def test_batch_and_sequence_length_stay_free_and_what_the_model_fixes_is_refused():
    torch.manual_seed(0)
    model = randomized(Attending())
    net = dr.capture(model, (torch.randint(20, (2, 6)), torch.zeros(2, 6, dtype=torch.bool)))
    for batch, length in ((2, 6), (3, 11), (1, 4)):
        mask = torch.arange(length) >= torch.tensor([[length - 1]] * batch)
        assert_alike(net, model, torch.randint(20, (batch, length)), mask)

    class Unrolled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.zeros_like(x[:, 0])
            for t in range(int(x.shape[1])):
                h = torch.tanh(self.cell(h + x[:, t]))
            return h

    unrolled, x = Unrolled(), torch.randn(2, 5, 8)
    net = dr.capture(unrolled, (x,), how=dr.Capture.EXPORT)
    assert_alike(net, unrolled, torch.randn(4, 5, 8))
    with pytest.raises(AssertionError, match="exported for 5 numbers in dimension 1 of x, and serves no other"):
        net(torch.randn(4, 6, 8))


SEEN: list[Tensor] = []


class Watching(nn.Module):
    """Hooks that the first forward registers, as libraries do to collect hidden states."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.hooked = nn.Linear(8, 8), nn.Linear(8, 8), False

    def forward(self, x: Tensor) -> dict[str, Any]:
        if not self.hooked:
            self.hooked = True
            for layer in (self.a, self.b):
                layer.register_forward_hook(lambda module, args, output: SEEN.append(output))
        SEEN.clear()
        x = self.b(torch.tanh(self.a(x.reshape(int(x.shape[0]), 8))))
        return {"out": x, "hidden": tuple(SEEN)}


def test_hooks_that_forward_registers_are_not_registered_twice():
    model, x = Watching(), torch.randn(4, 8)
    net = dr.capture(model, (x,))
    expected = copy.deepcopy(model)(x)
    assert len(expected["hidden"]) == 2
    assert same(net.eval()(x), expected)
    assert same(net.train()(x), expected)
    assert not model.hooked, "the model given is as it was"


class Rounded(torch.autograd.Function):
    """Rounding whose gradient passes straight through: torch.export would see a gradient of zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class StraightThrough(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = linears(), linears()

    def forward(self, x: Tensor) -> Tensor:
        return self.after(Rounded.apply(self.before(x)))


def test_a_function_with_a_backward_of_its_own_keeps_it():
    model, x = StraightThrough(), torch.randn(4, 8)
    with pytest.raises(dr.CaptureError, match=r"cannot be captured whole: Rounded has a backward of its own"):
        dr.capture(model, (x,), how=dr.Capture.EXPORT)
    net = dr.transform(model, (x,), rank=dr.Fixed(2))
    assert dr.plan_of(net).capture.startswith("module by module (2 parts")
    assert len(dr.plan_of(net).sites) == 4
    assert_alike(net, model, x)
    assert float(net.get_parameter("before.0.weight").detach().abs().sum()) > 0


class Sampling(nn.Module):
    """torch.distributions checks its arguments by their values, which no tracer can."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.spread = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.distributions.Normal(self.mean(x), self.spread(x).exp()).rsample()


def test_distributions_can_be_exported_and_are_checked_as_before_afterwards(monkeypatch):
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", True)  # torch.compile turns it off
    model, x = Sampling(), torch.randn(4, 8)
    net = dr.capture(model, (x,), how=dr.Capture.EXPORT)
    assert_alike(net, model, torch.randn(5, 8))
    with pytest.raises(ValueError, match="constraint"):
        torch.distributions.Normal(torch.zeros(1), -torch.ones(1))


class Traced(nn.Module):
    """Computes otherwise, by more than rounding, when it is traced."""

    def __init__(self, off: float) -> None:
        super().__init__()
        self.a, self.off = linears(), off

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != 8:
            raise ValueError
        x = self.a(x)
        return x * (1 + self.off) if torch.compiler.is_exporting() else x


def test_an_export_that_computes_something_else_is_not_taken_and_rounding_is_said():
    x = torch.randn(4, 8)
    net = dr.capture(Traced(1e-2), (x,))
    assert dr.make_plan(net, dr.Fixed(2), (x,)).capture.startswith("module by module (1 parts")
    assert_alike(net, Traced(1e-2), x)
    with pytest.raises(dr.CaptureError, match=r"as torch.export has it is not the same: its graph computes something"):
        dr.capture(Traced(1e-2), (x,), how=dr.Capture.EXPORT)
    close = dr.capture(Traced(1e-6), (x,))
    assert "by torch.export (off by rounding: " in dr.make_plan(close, dr.Fixed(2), (x,)).capture


class Windows(nn.Module):
    """Pads to windows and merges them, again and again: the sizes become ever longer formulas of the input's."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = linears()

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != 8:
            raise ValueError
        x = self.fc(x)
        for _ in range(12):
            x = nn.functional.pad(x, (0, 0, 0, -x.shape[1] % 3))
            x = x.reshape(x.shape[0], -1, 3, x.shape[2]).sum(2).repeat_interleave(2, 1)
        return x


def test_sizes_that_grow_into_long_formulas_are_fixed_but_for_the_batch():
    torch.manual_seed(0)
    model, x = Windows(), torch.randn(2, 10, 8)
    net = dr.capture(model, (x,), how=dr.Capture.EXPORT)
    assert_alike(net, model, torch.randn(5, 10, 8))
    with pytest.raises(AssertionError, match="exported for 10 numbers in dimension 1 of x, and serves no other"):
        net(torch.randn(2, 12, 8))
